"""Exceptions that interrupt a store call from outside: from a signal handler or another thread.

An application's own deadline may well raise a ``TimeoutError``. That is an ``OSError``, like a lost
connection; if we mistook it for one, a retry would swallow it.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from operator import attrgetter
from types import FrameType, TracebackType


class Condition(threading.Condition):
    """A condition that always releases its lock, even if an exception strikes from outside.

    Python calls a signal's handler only where Python code runs. The class of the standard library
    takes its lock in Python code, so an exception can strike when the lock is taken and the
    ``with`` block hasn't begun. Here no such code runs in between.
    """

    __enter__ = property(attrgetter("_lock.__enter__"))
    __exit__ = property(attrgetter("_lock.__exit__"))


def interruption(error: BaseException) -> BaseException | None:
    """The exception that came from outside, if ``error`` is one or was raised in place of one.

    Another thread can only raise a class, so the exception has no arguments, unlike a driver's.
    """
    struck = None
    for one in _chain(error):  # the oldest one wins
        if _by_signal(one.__traceback__) or (isinstance(one, OSError) and not one.args):
            struck = one
    return struck


def reraise_interruption(error: BaseException) -> None:
    """Raise the exception from outside, if there is one. Return if the error is a driver's."""
    struck = interruption(error)
    if struck is not None:
        raise struck


def signal_interruption(error: BaseException) -> BaseException | None:
    """Like ``interruption``, for signal handlers only: for libraries with threads of their own."""
    return next((one for one in _chain(error) if _by_signal(one.__traceback__)), None)


def _chain(error: BaseException) -> Iterator[BaseException]:
    """``error`` and the exceptions that it replaced during the current call."""
    outer: set[FrameType] = set()
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        outer.add(frame)
        frame = frame.f_back
    seen: set[int] = set()
    one: BaseException | None = error
    while one is not None and id(one) not in seen:
        seen.add(id(one))
        yield one
        one = one.__cause__ or one.__context__
        # Ignore an exception that an outer frame handles, such as an error page reading the
        # session.
        if one is not None and one.__traceback__ and one.__traceback__.tb_frame in outer:
            return


def _by_signal(traceback: TracebackType | None) -> bool:
    """Whether a signal handler raised it: Python passes it the frame that it interrupts."""
    while traceback is not None and traceback.tb_next is not None:
        interrupted, traceback = traceback.tb_frame, traceback.tb_next
        frame = traceback.tb_frame
        code = frame.f_code
        count = code.co_argcount + code.co_kwonlyargcount + bool(code.co_flags & 4)  # *arguments
        for name in code.co_varnames[:count]:
            given = frame.f_locals.get(name)
            if given is interrupted or (
                type(given) is tuple and any(each is interrupted for each in given)
            ):
                return True
    return False
