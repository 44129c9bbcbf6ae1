"""A store that keeps working while its centre can't be reached: a copy, and a queue of changes."""

from __future__ import annotations

import os
import time
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

from ...errors import CutOff, Gone, Stale, StoreUnavailable
from ...events import logger
from ..base import OTHER_ENDS, Deleted, Record, Replaced, Store
from ..parts import Edge, EdgeFigures, Reconciler, Settled, parts_of
from ..support import StoreOptions, closing, this_write
from ..wrappers.near_cache import NearCache
from ..wrappers.wrapper import CallWrapper, Wrapper
from .checks import PROBE, EdgeChecks
from .copy import Copy
from .link import Link
from .parts import EdgeBulk, EdgeLeases, EdgeNear
from .rows import Row, State
from .settling import Settler
from .waiting import Waiting
from .worker import Worker

T = TypeVar("T")

OFFLINE_FOR = 900.0  # seconds
OUTBOX = 100_000  # sessions
FRESH_FOR = 2.0  # seconds
_NEAR_BYTES = 64 * 1024 * 1024
_WARN_AGAIN = 60.0  # seconds
_CONFIRMATIONS = 20  # of a copy, within the time that it serves offline


class EdgeStore(Wrapper, Edge):
    """A store around ``centre``, with copies and a queue of changes in the SQLite file at ``path``.

    All workers of a node share the file. ``offline_for``: how many seconds a copy serves after the
    centre last confirmed it. ``outbox``: how many sessions may have queued changes. ``fresh_for``:
    how many seconds old a read without a round trip may be, if the centre's store can prove that; 0
    turns such reads off. ``owns_centre``: whether ``close`` also closes it.

    Raises ``SettingError`` as ``SQLiteStore`` does.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        centre: Store,
        options: StoreOptions | None = None,
        *,
        offline_for: float = OFFLINE_FOR,
        outbox: int = OUTBOX,
        fresh_for: float = FRESH_FOR,
        owns_centre: bool = True,
    ) -> None:
        options = options or StoreOptions()
        self.centre = centre
        self._owns_centre = owns_centre
        self.link = Link()
        parts = parts_of(centre)
        asked: Store = centre
        if fresh_for and parts.changes is not None and not parts.changes.unproven:
            asked = NearCache(centre, fresh_for, _NEAR_BYTES, options.clock)
        super().__init__(CallWrapper(asked, self.link.call))
        self.journal = None  # only the centre can keep one
        self.confirms_logouts = getattr(centre, "confirms_logouts", False)
        self.copy = Copy(
            path,
            timeout=options.timeout,
            prefix=options.prefix,
            clock=options.clock,
            offline=offline_for,
            most=outbox,
        )
        self.waiting = Waiting(self.copy)
        self.offline_for = offline_for
        self.outbox = os.path.realpath(path), options.prefix
        self._confirm_after = int(offline_for * 1000 / _CONFIRMATIONS)
        self.edge = self
        self._warn_at = 0.0
        if self.leases is not None:
            self.leases = EdgeLeases(self, self.leases)
        if self.near is not None:
            self.near = EdgeNear(self, self.near)
        if self.bulk is not None:
            self.bulk = EdgeBulk(self, self.bulk)
        self.checks = EdgeChecks(self.copy, self.waiting, centre)
        self._reconciler: Callable[[], Reconciler | None] = lambda: None
        # Settling must neither fill the near cache of this process nor wait for the link.
        self._settler = Settler(self.copy, self.waiting, centre, lambda: self._reconciler())
        self._worker = Worker(options.edge_sync)
        self.link.on_cut = self._worker.wake
        closing(self, self._worker.stop)
        closing(self, self.copy.file.close)

    # -- verbs

    def load(self, key: str) -> Record | None:
        return self.load_by(self.store.load, key)

    def load_by(self, ask: Callable[[str], Record | None], key: str) -> Record | None:
        """``load``, with ``ask`` in place of the centre's ``load``."""
        if key[-1:] in OTHER_ENDS:
            return ask(key)
        row = self._row(key)
        if row is not None and row.state is not State.PLAIN:
            return self.copy.served(row, self._why)
        began = self.copy.time()
        try:
            record = ask(key)
        except StoreUnavailable as error:
            if error.contention:
                raise
            row = self.copy.get(key)  # another worker may have changed it
            if row is None:
                raise CutOff(f"session {key} has no copy at this edge: {error.detail}") from error
            return self.copy.served(row, error.detail)
        if record is None:
            if row is not None:
                self._note(self.copy.absent, key, began)
        elif row is None:
            self._note(partial(self.copy.copied, new=True), record, began)
        elif row.record != record or began - row.confirmed_at > self._confirm_after:
            self._note(self.copy.copied, record, began)
        return record

    def create(self, record: Record) -> None:
        if record.key[-1:] in OTHER_ENDS:
            self.store.create(record)
            return
        row = self._row(record.key)
        if row is None or row.queued is None:
            began = self.copy.time()
            try:
                self.store.create(record)
            except CutOff:
                pass
            else:
                self._note(self.copy.created, record, began)
                return
        self.copy.queue_created(record, self._typed())

    def save(self, record: Record, expected_version: int, *, shorten: bool = False) -> None:
        if record.key[-1:] in OTHER_ENDS:
            self.store.save(record, expected_version, **_option(shorten))
            return
        if self._is_plain(record.key):
            began = self.copy.time()
            try:
                self.store.save(record, expected_version, **_option(shorten))
            except CutOff:
                pass
            except Gone:
                self._note(self.copy.absent, record.key, began)
                raise
            else:
                self._note(self.copy.copied, record, began)
                return
        typed = self._typed()
        self.copy.queue_saved(record, expected_version, typed, shorten=shorten, why=self._why)

    def renew(self, record: Record, idle_expires_at: int) -> bool:
        if record.key[-1:] in OTHER_ENDS:
            return self.store.renew(record, idle_expires_at)
        if self._is_plain(record.key):
            began = self.copy.time()
            try:
                renewed = self.store.renew(record, idle_expires_at)
            except CutOff:
                pass
            else:
                if renewed:
                    end = min(
                        max(idle_expires_at, record.idle_expires_at), record.absolute_expires_at
                    )
                    self._note(self.copy.copied, record._replace(idle_expires_at=end), began)
                return renewed
        return self.copy.queue_renewed(record, idle_expires_at, self._why)

    def replace(
        self,
        key: str,
        record: Record,
        expected_version: int,
        pointer: Record | None,
        *,
        shorten: bool = False,
    ) -> Replaced | None:
        ask = partial(self.store.replace, shorten=True) if shorten else self.store.replace
        return self.replace_by(ask, key, record, expected_version, pointer)

    def replace_by(
        self,
        ask: Callable[..., Replaced | None],
        key: str,
        record: Record,
        expected_version: int,
        pointer: Record | None,
        *more: Any,
    ) -> Replaced | None:
        """``replace``, with ``ask`` in place of the centre's."""
        if key[-1:] in OTHER_ENDS:
            return ask(key, record, expected_version, pointer, *more)
        self.check_settled(key, "a new token")
        # Withdraw the copy before the centre changes anything: a full disk may refuse it.
        copied = self.copy.withdrawn(key)
        began = self.copy.time()
        try:
            replaced = ask(key, record, expected_version, pointer, *more)
        except (Stale, StoreUnavailable):
            if copied is not None:
                self._note(self.copy.copied, copied.record, copied.confirmed_at)
            raise
        self._note(self.copy.rotated, key, record, pointer, began)
        return replaced

    def delete(self, key: str, expected_version: int | None = None) -> Deleted | bool:
        more = () if expected_version is None else (expected_version,)
        return self.delete_by(self.store.delete, key, *more)

    def delete_by(self, ask: Callable[..., Deleted | bool], key: str, *more: Any) -> Deleted | bool:
        """``delete``, with ``ask`` in place of the centre's. ``more``: arguments after the key."""
        if key[-1:] in OTHER_ENDS:
            return ask(key, *more)
        row = self._row(key)
        if row is None or row.queued is None:
            try:
                deleted = ask(key, *more)
            except StoreUnavailable as error:
                if error.contention:
                    raise
                # Even if the reply was lost: an end can be repeated.
            else:
                if deleted or row is None:
                    if deleted:
                        self.copy.ended(key, getattr(deleted, "record", None))
                    return deleted
                # It was rotated at the centre, or only this node has it.
                if row.state is not State.ENDED:
                    self.copy.queue_ended(key)
                    self._worker.wake()
                return deleted
        return self.copy.queue_ended(key, *more[:1])

    def close(self) -> None:
        self._worker.stop()
        self.copy.file.close()
        if self._owns_centre:
            self.centre.close()

    # -- part ``edge``

    @property
    def cut_off(self) -> str:
        """Why this process serves from its copies now; "" if it reaches the centre."""
        return self.link.why

    def use(self, reconciler: Reconciler) -> None:
        """Settle with this reconciler, as long as it exists."""
        self._reconciler = weakref.ref(reconciler)

    def figures(self) -> EdgeFigures:
        """The changes that wait, and the counts of settled ones."""
        return self.waiting.figures()

    def settle(self) -> Settled | None:
        """Check whether the centre is back, and settle with it now."""
        ends = 0
        if self.link.is_cut:
            back = self._reconnect()
            if back is None or not back.reached:
                return back
            ends = back.ends
        settled = self._settle()
        return settled and settled._replace(ends=settled.ends + ends)

    def _settle(self, *, only_ends: bool = False) -> Settled | None:
        settled = self._settler.settle(only_ends=only_ends)
        if settled is not None and not settled.reached:
            self.link.postpone_retry(StoreUnavailable(settled.trouble))
        return settled

    def _reconnect(self) -> Settled | None:
        """Check whether the centre answers, and settle all ends with it."""
        try:
            self.centre.load(PROBE)
        except StoreUnavailable as error:
            self.link.postpone_retry(error)
            return Settled(trouble=error.detail, reached=False)
        settled: Settled | None = Settled()
        if self.waiting.is_queued(ends=True):
            settled = self._settle(only_ends=True)
        if settled is not None and settled.reached:
            self.link.mark_restored()
        return settled

    def _look(self) -> None:
        """Try the centre again, from the worker thread, while the link is cut."""
        changes = self.changes
        if changes is not None and not changes.unproven and changes.feed(PROBE) is not None:
            self.link.try_soon()
        if self.link.may_try():
            self._reconnect()
            if not self.link.is_cut:
                self._settle_quietly()

    def _settle_quietly(self) -> bool:
        """Settle in the worker thread. Returns False if the next try should wait longer."""
        if not self.waiting.is_queued():
            return True
        settled = self.settle()
        return settled is None or not settled.trouble

    # -- for the parts

    @property
    def confirm_after(self) -> int:
        """Milliseconds between two writes of a copy's confirmation."""
        return self._confirm_after

    def check_settled(self, key: str, what: str) -> None:
        """Raise ``CutOff`` unless the centre can do ``what`` for this session now."""
        found = self._begun(self.copy.state_of, key)
        if found is not None and found.is_queued:
            if found.state == State.ENDED:
                raise Gone
            raise CutOff(
                f"{what} needs the centre, which doesn't have all changes of session {key} "
                f"yet: {self._why}"
            )
        if self.link.is_cut:
            raise CutOff(f"{what} needs the centre: {self.link.why}")

    def note_copied(self, record: Record, began: int) -> None:
        """Keep a copy of ``record``, which the centre confirmed; the call began at ``began``."""
        self._note(self.copy.copied, record, began)

    # -- the rest

    @property
    def _why(self) -> str:
        return self.link.why or "the changes are being settled"

    def _typed(self) -> frozenset[str]:
        """The typed keys of this write. Raises ``CutOff`` if the write can't be merged."""
        write = this_write()
        if write.refused:
            raise CutOff(f"{write.refused} needs the centre: {self._why}")
        return write.typed

    def _is_plain(self, key: str) -> bool:
        found = self._begun(self.copy.state_of, key)
        return found is None or not found.is_queued

    def _row(self, key: str) -> Row | None:
        return self._begun(self.copy.get, key)

    def _begun(self, ask: Callable[[str], T], key: str) -> T:
        self.copy.time.agree()
        if not self._worker.runs:
            this = weakref.ref(self)
            self._worker.start(
                lambda: _called(this, _is_cut),
                lambda: _called(this, EdgeStore._look),
                lambda: bool(_called(this, EdgeStore._settle_quietly)),
            )
            if self.link.is_cut and self._worker.lacks_thread and self.link.may_try():
                self._reconnect()
                if not self.link.is_cut:
                    self._settle_quietly()
        return ask(key)

    def _note(self, note: Callable[..., object], *arguments: Any) -> None:
        """Copy the centre's result. If that fails, the copy is merely out of date."""
        try:
            note(*arguments)
        except StoreUnavailable as error:
            if time.monotonic() >= self._warn_at:
                self._warn_at = time.monotonic() + _WARN_AGAIN
                logger.warning("The copy at this edge was not updated: %s", error)


def _is_cut(store: EdgeStore) -> bool:
    return store.link.is_cut


def _called(this: weakref.ref[EdgeStore], method: Callable[[EdgeStore], Any]) -> Any:
    store = this()
    return None if store is None else method(store)


def _option(shorten: bool) -> dict[str, bool]:
    return {"shorten": True} if shorten else {}
