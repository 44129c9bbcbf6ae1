"""Decorators that pass the values of typed keys to a view, or require them."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from flask import abort, redirect, url_for
from flask import session as flask_session
from werkzeug.wrappers import Response as BaseResponse

from ..errors import SettingError
from .keys import SessionKey

P = ParamSpec("P")
R = TypeVar("R")

_NO_VALUE: Any = object()


def use_session(*keys: SessionKey[Any]) -> Callable[[Callable[..., R]], Callable[..., R]]:
    """Pass the values of typed keys to a view, as keyword arguments with the keys' names.

    Put it below ``@app.route``. Works on async views too. The view raises what
    ``SessionKey.get`` raises. Raises ``SettingError`` unless all arguments are keys.
    """
    for key in keys:
        if not isinstance(key, SessionKey):
            raise SettingError(f"use_session takes SessionKeys, not a {type(key).__name__}")

    def decorate(function: Callable[..., R]) -> Callable[..., R]:
        def values() -> dict[str, Any]:
            return {key.name: key.get() for key in keys}

        if inspect.iscoroutinefunction(function):

            @functools.wraps(function)
            async def run_async(*args: Any, **kwargs: Any) -> Any:
                return await function(*args, **values(), **kwargs)

            return run_async  # type: ignore[return-value]  # the coroutine function R stands for

        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> R:
            return function(*args, **values(), **kwargs)

        return run

    return decorate


def require_session(
    *keys: SessionKey[Any] | str, redirect_to: str | None = None
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Run a view only if the session has these keys; typed keys must have valid values.

    Otherwise, the response is 401, or a redirect to the endpoint ``redirect_to``. Put it below
    ``@app.route``. Works on async views too.
    """
    if not keys:
        raise SettingError("require_session needs at least one key")

    def refusal() -> BaseResponse | None:
        if all(_is_there(key) for key in keys):
            return None
        if redirect_to is None:
            abort(401)
        return redirect(url_for(redirect_to))

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        if inspect.iscoroutinefunction(function):

            @functools.wraps(function)
            async def run_async(*args: P.args, **kwargs: P.kwargs) -> Any:
                refused = refusal()
                return await function(*args, **kwargs) if refused is None else refused

            return run_async  # type: ignore[return-value]  # the coroutine function R stands for

        @functools.wraps(function)
        def run(*args: P.args, **kwargs: P.kwargs) -> Any:
            refused = refusal()
            return function(*args, **kwargs) if refused is None else refused

        return run

    return decorate


def _is_there(key: SessionKey[Any] | str) -> bool:
    if isinstance(key, str):
        return key in flask_session
    return key.get(_NO_VALUE) is not _NO_VALUE
