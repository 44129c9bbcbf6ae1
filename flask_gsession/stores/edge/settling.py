"""Settles a node's ends and changes with the centre, ends first.

tests/simulation/edge_model.py has the protocol, and shows what goes wrong without each step.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from contextlib import suppress

from ...errors import (
    Gone,
    GSessionError,
    KeyTaken,
    Stale,
    StoreUnavailable,
    UnreadableRecord,
)
from ...events import logger
from ..base import MAX_POINTERS, Record, Store
from ..parts import Reconciler, Settled
from .claim import Claim
from .copy import Copy
from .node_file import NodeUnavailable
from .rows import Row, State
from .waiting import Waiting

_LEASE = 10.0  # seconds; a settler extends it with each batch
_BATCH = 100
_PASSES = 3
_ATTEMPTS = 25  # for a session that others keep writing to


class _Refused(Exception):
    """This process must not settle now: the centre has other keys, or another process settles."""


class Settler:
    """Settles the changes in ``waiting`` with ``centre``, the store without the copy."""

    def __init__(
        self,
        copy: Copy,
        waiting: Waiting,
        centre: Store,
        reconciler: Callable[[], Reconciler | None],
    ) -> None:
        self._copy = copy
        self._waiting = waiting
        self._centre = centre
        self._reconciler = reconciler
        self._warned = ""  # the trouble that was logged last

    def settle(self, *, only_ends: bool = False) -> Settled | None:
        """Settle what is queued; None if another process of this node does so now.

        If nothing can be written, such as on a full disk, all ends are still sent to the centre,
        every time again: repeats do no harm.
        """
        reconciler = self._reconciler()
        if reconciler is None:
            return Settled(trouble="no application uses this store yet")
        if not self._waiting.is_queued(ends=only_ends):
            return Settled()
        name, full = secrets.token_hex(8), ""
        try:
            if not self._waiting.lease(name, _LEASE):
                return None
        except NodeUnavailable as error:
            full = error.detail
        run = _Run(self._copy, self._waiting, self._centre, reconciler, name, notes=not full)
        try:
            run.check_compatible()
            for _ in range(_PASSES):  # more may be queued while it settles
                run.all_of(ends=True)
                run.trouble = run.trouble or full
                if not only_ends and not full:
                    run.claim()
                    run.all_of(ends=False)
                if run.trouble or not self._waiting.is_queued(ends=only_ends):
                    break
        except _Refused as error:
            run.trouble = str(error)
        except NodeUnavailable as error:
            run.trouble = error.detail
        except StoreUnavailable as error:
            run.trouble, run.reached = error.detail, False
        except BaseException as error:
            run.trouble = f"{type(error).__name__} while settling"
            raise
        finally:
            empty = not run.trouble and not self._waiting.is_queued()
            with suppress(NodeUnavailable):  # the lease expires by itself
                self._waiting.release(name, run.trouble, empty=empty)
            self._warn(run.trouble if run.reached else self._warned)
        return Settled(run.ends, run.changes, run.dropped, run.trouble, run.reached)

    def _warn(self, trouble: str) -> None:
        """Log a problem once; a lost centre is logged elsewhere."""
        if trouble and trouble != self._warned:
            logger.warning("Some changes that wait at this edge were not settled: %s", trouble)
        self._warned = trouble


class _Run:
    def __init__(
        self,
        copy: Copy,
        waiting: Waiting,
        centre: Store,
        reconciler: Reconciler,
        name: str,
        *,
        notes: bool,
    ) -> None:
        self._copy = copy
        self._waiting = waiting
        self._centre = centre
        self._reconciler = reconciler
        self._name = name
        self._notes = notes
        self._node = waiting.figures().node
        self.ends = self.changes = self.dropped = 0
        self.trouble = ""
        self.reached = True
        self._claimed = False

    def check_compatible(self) -> None:
        """Check that the centre and this node can read each other's records."""
        problem = self._reconciler.incompatibility(self._centre)
        if problem:
            raise _Refused(problem)

    def claim(self) -> None:
        """Check, before changes, that no other file of this node has settled them."""
        if not self._claimed and self._waiting.is_queued():
            problem = Claim(self._copy).renew(self._centre, self._node)
            if problem:
                raise _Refused(problem)
            self._claimed = True

    def all_of(self, *, ends: bool) -> None:
        """Settle everything that is queued now, a batch at a time."""
        after, upto = 0, self._waiting.last_number()
        while True:
            batch = self._waiting.queue(ends=ends, after=after, upto=upto, limit=_BATCH)
            if not batch:
                return
            if self._notes and not self._waiting.lease(self._name, _LEASE):
                raise _Refused("another process of this node is settling")
            after = batch[-1][1]
            for key, _ in batch:
                row = self._copy.get(key)
                if row is None or row.queued is None or (row.state is State.ENDED) is not ends:
                    continue  # another process settled it, or it ended since
                try:
                    if ends:
                        self._end(row)
                    else:
                        self._change(row)
                except UnreadableRecord as error:
                    if not error.for_others:
                        self._drop(row, f"its record is {error.reason}")
                        continue
                    # The rest stays queued until this node has the encryption key.
                    self.trouble = f"session {row.record.key} at the centre: {error}"
                except GSessionError as error:
                    if isinstance(error, StoreUnavailable) and not error.contention:
                        raise
                    self.trouble = f"session {row.record.key}: {error}"  # continue with the others

    def _end(self, row: Row) -> None:
        self._reconciler.end(row.record.key, row.base or row.record)
        if self._notes:
            self._waiting.end_delivered(row)
        self.ends += 1

    def _change(self, row: Row) -> None:
        created = row.state is State.CREATED
        pushed = created and row.sent is not None
        if created and not pushed and not row.record.is_live(self._copy.now()):
            self._waiting.dropped(row, counts=False)  # it expired before the centre had it
            return
        if created and not pushed:
            # A change whose reply is missing gets dropped, so first check whether the centre
            # answers.
            self._centre.load(row.record.key)
        noted = self._waiting.sending(row)
        if noted is None:
            return
        assert noted.sent is not None
        began = self._copy.time()
        if created and not pushed and self._create(noted):
            if not self._waiting.arrived(noted, noted.sent, [], began):
                self._centre.delete(
                    noted.record.key
                )  # it was dropped while this process was paused
                return
            self.changes += 1
            return
        for _ in range(_ATTEMPTS):
            began = self._copy.time()
            pointers, there = self._find(noted.record.key)
            if there is None:
                self._drop(noted, "the session has ended")
                return
            merged = None if created else self._merge(noted, there)
            if merged is not None:
                try:
                    if merged.idle_expires_at < there.idle_expires_at:
                        self._centre.save(merged, there.version, shorten=True)
                    else:
                        self._centre.save(merged, there.version)
                except (Stale, Gone):
                    continue
                there = merged
            if noted.base is not None:
                self._reconciler.settled(noted.base, there, noted.sent)
            self._waiting.arrived(noted, there, pointers, began)
            self.changes += 1
            return
        self.trouble = f"too many other writes to session {noted.record.key}"

    def _merge(self, row: Row, there: Record) -> Record | None:
        assert row.base is not None
        assert row.sent is not None
        assert row.number is not None
        return self._reconciler.merge(row.base, there, row.sent, row.typed, self._node, row.number)

    def _create(self, row: Row) -> bool:
        """Create a session that was created here. False if it is there and has changed since."""
        assert row.sent is not None
        try:
            self._centre.create(row.sent)
        except KeyTaken:
            return False
        except StoreUnavailable as error:
            if not error.asked:
                self._waiting.unsent(row)
            raise
        return True

    def _find(self, key: str) -> tuple[list[Record], Record | None]:
        """The pointers that lead to the session at the centre, and its record."""
        pointers: list[Record] = []
        now = self._copy.now()
        while len(pointers) < MAX_POINTERS:
            record = self._centre.load(key)
            if record is None or now >= record.idle_expires_at:
                break
            if record.successor is None:
                return pointers, record
            pointers.append(record)
            key = record.successor
        return pointers, None

    def _drop(self, row: Row, why: str) -> None:
        given_up = self._waiting.dropped(row)
        if given_up is not None:
            self.dropped += 1
            logger.warning(
                "Session %s: changes made at this edge are lost: %s", row.record.key, why
            )
            self._reconciler.dropped(given_up.base, given_up.record, why)
