"""Large values of a session: streamed in and out, and what is done where one is lost."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from itertools import chain
from typing import Any

from .errors import (
    Gone,
    GSessionError,
    SessionConflict,
    SessionEnded,
    SettingError,
    Stale,
    StoreUnavailable,
    UnreadableRecord,
    ValueLost,
)
from .events import LargeValueLost, logger
from .keeper import ATTEMPTS
from .lifecycle import Lifecycle, Storing, alone
from .marks import PLAIN, Mark, expired, marked, split
from .payload import Body
from .references import BYTES, holds, reference_in, refers
from .spill import ValueReader, pieces_from

_SMALL = 16 * 1024  # bytes of an attached file that stays in the record
# These stay where they are, for a worker that can read them.
_FOR_OTHERS = ("unknown encryption key", "not encrypted")


class LargeValues(Lifecycle):
    """What a session does with values that have a place of their own."""

    _lost_once: dict[str, bytes] | None = None

    def _attach(self, key: str, file: Any, mark: Mark) -> int | bytes:
        """Write a file away as the value of ``key``; its length, or all of it where it is small."""
        keeper = self._keeper
        values = self._open_for_writing()
        self._check_store()
        if keeper.spill is None:
            raise SettingError(
                f"session.attach({ascii(key)[:60]}) needs a place for large values: this "
                "SESSION_STORE has none"
            )
        pieces = pieces_from(file, keeper.spill.frame_bytes)
        first = next(pieces, b"")
        limit = keeper.settings.spill_bytes
        if (
            len(first) <= (_SMALL if limit is None else limit)
            and len(first) < keeper.spill.frame_bytes
        ):
            return first
        if keeper.check is not None:
            checked = keeper.check(key, first)  # there is no more of it in memory
            mark = checked if mark == PLAIN else mark._replace(version=checked.version)
        body = Body(values.stored, self._lifetime)
        absolute = self._record.absolute_expires_at if self._record else None
        end = keeper.blobs_end(body, absolute)
        try:
            reference = keeper.spill.write(
                f"session[{ascii(key)[:60]}]",
                BYTES,
                chain([first], pieces),
                lambda: keeper.blobs_end(body, absolute),
                room=keeper.room_for(key, values.stored),
            )
        except StoreUnavailable as error:
            self._met_outage(error, "written to")
            raise
        self._place(reference, end)
        values.give(key, marked(reference.pack(), mark), keeper.now)
        return reference.length

    def _reader(self, key: str) -> ValueReader | None:
        """A reader of the large bytes under ``key``; None where its value is in memory."""
        values = self._open()
        raw = values.held(key)
        if raw is None or not refers(raw):
            return None
        try:
            reference = reference_in(raw)
        except UnreadableRecord as error:
            self._refuse(error.reason, error.detail)
            raise KeyError(key) from None
        if reference.kind != BYTES:
            raise TypeError(f"session[{ascii(key)[:60]}] holds no bytes: there is nothing to open")
        spill = self._keeper.spill
        try:
            if spill is None:
                raise ValueLost("missing")
            return ValueReader(reference, lambda number: spill.frame(reference, number))
        except ValueLost as error:
            self._lost(key, raw, error)
            return self._reader(key)

    def _decoded(self, key: str, raw: bytes) -> tuple[Mark, Any]:
        """The value of a key, and its mark; that of what is there by now where it was lost.

        Raises ``KeyError`` where nothing is, and ``UnreadableRecord``.
        """
        mark, plain = split(raw)
        try:
            return mark, self._keeper.codec.decode(plain)
        except ValueLost as error:
            self._lost(key, raw, error)
        newer = self._values.raw(key)
        if newer is None:
            raise KeyError(key)
        return self._decoded(key, newer)

    def _lost(self, key: str, raw: bytes, error: ValueLost) -> None:
        """The large value that ``raw`` refers to could not be read.

        Another request may have replaced it, a while ago. Returns where it is worth another try;
        else the key is absent from now on, and ``KeyError`` is raised.
        """
        values = self._values
        if self._lost_once is None:
            self._lost_once = {}
        if self._lost_once.get(key) != raw:
            self._lost_once[key] = raw
            newer = raw if values.has_changed(key) else self._stored_now(key)
            if newer is None:  # it went with its session, or was removed
                values.hide(key)
                raise KeyError(key)
            if newer != raw:
                values.correct(key, newer, self._keeper.now)
            return
        handle = self._record.key if self._record else None
        logger.warning(
            "Session %s: the large value under %a is lost: %s", handle, key[:60], error.reason
        )
        self._keeper.events.emit(LargeValueLost, key, error.reason, handle)
        values.hide(key)
        kept = error.reason in _FOR_OTHERS or self._in_transaction
        if self._record is not None and not kept:
            try:
                self._rewrite(key, lambda there: None if there == raw else there, "a repair")
            except GSessionError as failure:
                logger.warning("A lost value could not be removed: %s", failure)
        raise KeyError(key)

    @alone
    def _rewrite(
        self, key: str, rewrite: Callable[[bytes | None], bytes | None], what: str
    ) -> bytes | None:
        """Store ``rewrite(raw)`` in the place of the encoded value of ``key`` now, and return it.

        ``rewrite`` runs again when another request was faster. None stands for no value.
        """
        self._check_lease()
        for losses in range(ATTEMPTS):
            if losses and not self._catch_up_after(losses):
                self._end(what)
            if self._record is None:
                raise SessionEnded
            values = self._values
            stored = values.unexpired()
            raw = stored.get(key)
            try:
                changed = rewrite(raw)
            except UnreadableRecord as error:
                self._refuse(error.reason, error.detail)
                raise SessionEnded from None
            except ValueLost as error:
                assert raw is not None
                with suppress(KeyError):
                    self._lost(key, raw, error)
                    continue
                if self._values.stored.get(key) == raw:
                    raise SessionConflict from None  # others may be able to read it
                continue
            if holds(raw, changed):
                changed = raw
            if changed != raw:
                stored = dict(stored)
                if changed is None:
                    del stored[key]
                else:
                    stored[key] = changed
                old = self._record
                try:
                    stored = self._put_away(stored)
                    body = self._body(stored)
                    with Storing(self):
                        self._record = self._keeper.save(old, body, lease=self._lease)
                except (Stale, Gone):
                    continue
                except StoreUnavailable as error:
                    self._met_outage(error, "saved")
                    raise
                except UnreadableRecord as error:
                    self._refuse(error.reason, error.detail)
                    raise SessionEnded from None
                if self._trace is not None:
                    self._trace.stored(key, raw, changed)
                self._saved(old, stored, losses)
                self._let_go(values.stored, stored)
            values.follow(stored)
            return stored.get(key)
        raise self._too_many_races()

    def _stored_now(self, key: str) -> bytes | None:
        """What the store holds under ``key`` by now; None where that, or the session, is gone."""
        if self._record is None:
            return None
        try:
            loaded = self._keeper.find(self._record.key)
        except UnreadableRecord:
            return None
        raw = None if loaded is None else loaded.body.values.get(key)
        return None if expired(raw, self._keeper.now()) else raw
