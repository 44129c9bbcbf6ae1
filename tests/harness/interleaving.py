"""Lets another thread act between two steps of a function, at the same step every time."""

from __future__ import annotations

import inspect
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from types import FrameType
from typing import Any


@contextmanager
def _traced(trace: Any) -> Iterator[None]:
    """Trace this thread."""
    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)


@contextmanager
def before_line(
    function: Callable[..., Any], text: str, act: Callable[[], object]
) -> Iterator[None]:
    """Run ``act`` in another thread, once, before ``function`` runs its line with ``text``.

    Only in this thread, and in threads that start within the block.
    """
    lines, first = inspect.getsourcelines(function)
    numbers = {first + at for at, line in enumerate(lines) if text in line}
    assert len(numbers) == 1, f"{len(numbers)} lines with {text!r}"
    code, acted = function.__code__, threading.Event()
    other = threading.Thread(target=act)

    def trace(frame: FrameType, event: str, _: object) -> Any:
        if frame.f_code is not code:
            return None
        if event == "line" and frame.f_lineno in numbers and not acted.is_set():
            acted.set()
            other.start()
            other.join(0.2)  # unless it waits for a lock that this thread holds
        return trace

    before = threading.gettrace()
    threading.settrace(trace)
    try:
        with _traced(trace):
            yield
    finally:
        threading.settrace(before)  # type: ignore[arg-type]  # None is allowed
    assert acted.is_set(), f"the line with {text!r} didn't run"
    other.join(30)
    assert not other.is_alive()


@contextmanager
def strike_at(
    function: Callable[..., Any], step: int, error: type[BaseException]
) -> Iterator[list[int]]:
    """Raise ``error`` in ``function``, once, before the line that it runs as number ``step``.

    Only in this thread. Yields the numbers at which it was raised: none after the last line.
    """
    struck: list[int] = []
    code, at = function.__code__, -1

    def trace(frame: FrameType, event: str, _: object) -> Any:
        nonlocal at
        if frame.f_code is not code:
            return None
        if event == "line" and not struck:
            at += 1
            if at == step:
                struck.append(at)
                raise error
        return trace

    with _traced(trace):
        yield struck


def at_each_step(function: Callable[..., Any], act: Callable[[], object]) -> Iterator[int]:
    """Run the loop's body once for each step of ``function``, and call ``act`` before that step.

    A step is one instruction of Python's virtual machine, so this acts between two parts of one
    expression too, as another thread can. ``act`` must not need a lock.
    """
    code = function.__code__
    for step in count():
        at, acted = -1, False

        def trace(frame: FrameType, event: str, _: object, step: int = step) -> Any:
            nonlocal at, acted
            if frame.f_code is not code:
                return None
            frame.f_trace_opcodes = True
            if event == "opcode":
                at += 1
                if at == step:
                    acted = True
                    act()
            return trace

        with _traced(trace):
            yield step
        if not acted:
            return
