"""The scopes of limited views, and the order of their decorators."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakValueDictionary

from flask import Blueprint, Flask, current_app, request

from ..errors import SettingError
from ..weak import WeakObjects
from .ratelimit_arguments import METHODS
from .ratelimit_counting import NAME


def scope_of_view(limited: Callable[..., Any], name: str) -> str:
    """The scope of a limited view: its name, and its first endpoint.

    So views from one factory count separately, and a view with several URLs counts once. The scope
    of a limited function that isn't a view is its name.
    """
    endpoint = request.endpoint or ""
    views = current_app.view_functions
    view = views.get(endpoint)
    known: dict[tuple[str, int, int], str] = current_app.extensions[NAME].scopes
    at = (endpoint, id(view), id(limited))
    if at not in known:
        first = next((each for each, other in views.items() if other is view), "")
        known[at] = f"{name} {first}" if _holds(view, limited) else name
    return known[at]


def _holds(view: object, limited: object) -> bool:
    """Whether this view is ``limited``, wraps it, or is a class with it as a method."""
    kind = getattr(view, "view_class", None)
    methods = [getattr(kind, name, None) for name in (*map(str.lower, METHODS), "dispatch_request")]
    for each in (view, *methods):
        function = each
        while function is not None:
            if function is limited:
                return True
            function = getattr(function, "__wrapped__", None)
    return False


def scope_of_blueprint(blueprint: Blueprint) -> str:
    names = (name for name, each in current_app.blueprints.items() if each is blueprint)
    return f"Blueprint:{next(names, blueprint.name)}"


class _IdentitySet:
    """A set of objects by identity. Holds weak references if the objects support them."""

    def __init__(self) -> None:
        self._weak: WeakValueDictionary[int, Any] = WeakValueDictionary()
        self._kept: dict[int, object] = {}

    def add(self, each: object) -> None:
        try:
            self._weak[id(each)] = each
        except TypeError:
            self._kept[id(each)] = each

    def __contains__(self, each: object) -> bool:
        return self._weak.get(id(each)) is each or id(each) in self._kept


# Views passed to session_limit. If the application registers one of these directly, session_limit
# is above the route's decorator, and limits nothing.
undecorated = _IdentitySet()


apps: WeakObjects[Flask] = WeakObjects()


class ViewFunctions(dict[str, Any]):
    """The views of an application; refuses views whose decorators are in the wrong order.

    A blueprint with such a view is refused when you register it.
    """

    def __init__(self, views: dict[str, Any]) -> None:
        super().__init__()
        for endpoint, view in views.items():
            self[endpoint] = view

    def __setitem__(self, endpoint: str, view: Any) -> None:
        check_view(endpoint, view)
        super().__setitem__(endpoint, view)


def check_view(endpoint: str, view: Callable[..., Any]) -> None:
    if view in undecorated:
        raise SettingError(
            f"The view of {endpoint!r} is not limited: session_limit is above the decorator of the "
            "route; put it below, next to the function"
        )


def refuse_undecorated() -> None:
    endpoint = request.endpoint
    if endpoint is not None:
        check_view(endpoint, current_app.view_functions[endpoint])
