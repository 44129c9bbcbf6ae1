"""Transactions: blocks whose changes are stored together, on the state they saw, or not at all."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Generic, TypeVar

from ..errors import SessionEnded, TransactionMisused
from .blocks import begin_block, leave_block, roll_back
from .checks import check_not_in_retried_code, check_reaches_centre, check_store
from .following import catch_up
from .lifecycle import Lifecycle
from .loading import open_from_store
from .saving import commit
from .state import Block, current_block
from .writing import LostRace

R = TypeVar("R")
S = TypeVar("S")


class Transaction(Generic[S]):
    """A transaction on a session, from ``session.transaction()``.

    As a context manager, it runs its block once. The block starts with the stored state, and its
    changes are stored at its end, not with the response. If another request has stored something by
    then, you get ``SessionConflict``, and nothing of the block is stored. An exception in the block
    discards its changes as well. To retry instead, use ``run`` or the decorator
    ``session_transaction``.

    The request's earlier changes are stored first. Two round trips, one more if there were any.
    """

    def __init__(self, session: S, life: Lifecycle) -> None:
        self._session = session
        self._life = life
        self._block: Block | None = None

    def __enter__(self) -> S:
        try:
            self._begin()
        except BaseException:  # also after an exception from a signal handler
            self._leave(roll_back)
            raise
        return self._session

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is not None:
            self._leave(roll_back)
            return
        try:
            with self._life.mutex:
                commit(self._life, transaction=self._block)
        except BaseException:
            self._leave(roll_back)
            raise
        self._leave(leave_block)

    def _begin(self) -> None:
        """Store pending changes, and start with the stored state."""
        life = self._life
        check_store(life)
        check_reaches_centre(life, "a transaction")
        with life.mutex:  # or another thread's change after the first look would be rolled back
            seen_before = life.opened
            open_from_store(life, "a transaction")
            check_not_in_retried_code(life, "A second transaction")
            if life.locked and (life.block is None or current_block.get() is not life.block):
                # Their changes could not be stored or rolled back separately.
                raise TransactionMisused(
                    "Another thread or task of this request has the lock of the session, or waits "
                    "for it. A transaction begins before that, after it, or inside its block."
                )
            if seen_before:
                commit(life)
                if life.seen.record is not None and not catch_up(life, discard=True):
                    life.end("a transaction")
            if life.ended:
                raise SessionEnded
            self._block = begin_block(life, "transaction")
        current_block.set(self._block)

    def _leave(self, leave: Callable[[Lifecycle, Block], None]) -> None:
        block, self._block = self._block, None
        if block is not None:
            leave(self._life, block)

    def run(self, function: Callable[[S], R]) -> R:
        """Call ``function(session)`` until its changes are stored, and return its last result.

        ``function`` gets a fresh state on each run. It may run many times, so it must have no side
        effects outside the session. Raises ``SessionConflict`` after too many lost races, and any
        exception of ``function``.
        """
        for _ in self._life.tries():
            try:
                with self as session:
                    return function(session)
            except LostRace:
                continue
        raise AssertionError("the tries end with a return or an error")
