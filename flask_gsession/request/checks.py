"""Checks whether a method is possible now. Each raises the reason if it isn't."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Any

from ..errors import CutOff, LockMisused, TransactionMisused
from .lifecycle import Lifecycle


def check_store(life: Lifecycle) -> None:
    """Raises the outage that this request has met, instead of waiting for the store again."""
    outage = life.outage  # once, since other threads replace it
    if outage is not None:
        raise outage.error


def check_reaches_centre(life: Lifecycle, what: str) -> None:
    """Raises ``CutOff`` on an edge that is cut off, as ``what`` needs the centre."""
    edge = life.repository.edge
    if edge is not None and life.repository.is_cut_off:
        raise CutOff(f"{what} needs the centre: {edge.cut_off}")


def check_lease(life: Lifecycle) -> None:
    """Raises ``LockMisused`` in a forked child, which may not write under its parent's lock."""
    if life.lease is not None and life.lease_pid != os.getpid():
        raise LockMisused(
            "The process that entered this lock holds it. A forked child can't write under it."
        )


def in_retried_code(life: Lifecycle) -> bool:
    """Whether the caller is code that runs again after a lost race."""
    block = life.block  # once, since another thread may leave it
    if block is not None and block.kind == "transaction":
        return True
    return life.in_function is not None and threading.get_ident() in life.in_function


def check_not_in_retried_code(life: Lifecycle, what: str) -> None:
    """Raises ``TransactionMisused`` in code that runs again after a lost race."""
    if in_retried_code(life):
        raise TransactionMisused(
            f"{what} isn't possible inside a transaction, or in the function of update_atomic: "
            "it could not be undone or run again. Do it before or after."
        )


def call_retried(life: Lifecycle, function: Callable[[Any], Any], value: Any) -> Any:
    """Call the function of an ``update_atomic`` with ``value``."""
    thread = threading.get_ident()
    with life.mutex:
        life.in_function = {*(life.in_function or ()), thread}
    try:
        return function(value)
    finally:
        with life.mutex:
            life.in_function = life.in_function - {thread}
