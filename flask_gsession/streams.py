"""Detects streamed bodies that can read the session after the headers were sent."""

from __future__ import annotations

import gc
import inspect
from collections.abc import Iterator
from functools import partial
from types import FunctionType, GeneratorType
from typing import Any

import flask.ctx
from flask import Response
from werkzeug.local import LocalProxy

# Flask 3.2 has one kind of context.
_CONTEXT: Any = vars(flask.ctx).get("RequestContext", flask.ctx.AppContext)
_MAX_OBJECTS = 1000  # to examine


def can_read_session(response: Response) -> bool:
    """Whether the body refers to its request context, for example by ``stream_with_context``.

    Without the context, ``flask.session`` raises, so a file or a plain generator can't read it.
    Looks inside iterators that wrap others. Returns True if there are too many objects to examine.
    """
    if response.is_sequence:
        return False
    pending: list[Any] = [response.response]
    for looked_at in range(_MAX_OBJECTS):
        if not pending:
            return False
        part = pending.pop()
        # isinstance() and vars() would resolve a LocalProxy, and resolving flask.session counts as
        # an access.
        kind = type(part)
        if issubclass(kind, _CONTEXT):
            return True
        if issubclass(kind, LocalProxy):
            continue
        if issubclass(kind, GeneratorType):
            pending += inspect.getgeneratorlocals(part).values()
        elif issubclass(kind, Response):
            pending.append(part.response)
        elif issubclass(kind, FunctionType):  # from copy_current_request_context
            pending += (cell.cell_contents for cell in part.__closure__ or () if _is_set(cell))
        elif issubclass(kind, partial):
            pending += (part.func, *part.args)
        elif issubclass(kind, Iterator) or looked_at == 0:
            pending += gc.get_referents(part)
            pending += getattr(part, "__dict__", {}).values()
        elif issubclass(kind, tuple):
            pending += part
    return True


def _is_set(cell: Any) -> bool:
    try:
        return cell.cell_contents is not cell
    except ValueError:  # the variable has no value yet
        return False
