"""Exceptions that strike a store call from outside: from a signal handler or another thread.

A deadline of the application's own may well be a ``TimeoutError``, which is an ``OSError``, as a
lost connection is. If we mistook it for one, a retry would swallow it.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from operator import attrgetter
from types import FrameType, TracebackType


class Condition(threading.Condition):
    """One whose lock no exception from outside leaves held.

    Python calls a signal's handler only where Python code runs. The class of the standard library
    takes its lock in Python code, so an exception can strike when the lock is taken and the
    ``with`` block hasn't begun. Here no such code runs in between.
    """

    __enter__ = property(attrgetter("_lock.__enter__"))
    __exit__ = property(attrgetter("_lock.__exit__"))


def interruption(error: BaseException) -> BaseException | None:
    """The exception that came from outside, if ``error`` is one or was raised in place of one.

    Another thread raises a class, so without arguments, as no driver does.
    """
    struck = None
    for one in _chain(error):  # the first one is the last of them
        if _by_signal(one.__traceback__) or (isinstance(one, OSError) and not one.args):
            struck = one
    return struck


def reraise_interruption(error: BaseException) -> None:
    """Raise what ``interruption`` finds; return where ``error`` is the driver's own."""
    struck = interruption(error)
    if struck is not None:
        raise struck


def signal_interruption(error: BaseException) -> BaseException | None:
    """As ``interruption``, of signal handlers only: for libraries with threads of their own."""
    return next((one for one in _chain(error) if _by_signal(one.__traceback__)), None)


def _chain(error: BaseException) -> Iterator[BaseException]:
    """``error``, and those in whose place it was raised, within the call that is under way."""
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
        # An exception handled further out, as by an error page that reads the session, is over.
        if one is not None and one.__traceback__ and one.__traceback__.tb_frame in outer:
            return


def _by_signal(traceback: TracebackType | None) -> bool:
    """Whether a signal handler raised it: it is called with the frame that it interrupts."""
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
