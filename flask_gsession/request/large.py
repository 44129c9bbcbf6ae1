"""A session's large values: streams them in and out, and handles lost ones."""

from __future__ import annotations

from contextlib import suppress
from functools import partial
from itertools import chain
from typing import Any

from ..errors import (
    GSessionError,
    SessionConflict,
    SettingError,
    StoreUnavailable,
    UnreadableRecord,
    ValueLost,
)
from ..events import LargeValueLost, logger
from ..values.large_values import ValueReader, pieces_from
from ..values.marks import PLAIN, Mark, expired, marked, split
from ..values.payload import Body
from ..values.references import BYTES, reference_in, refers
from .checks import check_store, in_retried_code
from .ending import refuse
from .lifecycle import ONE_KEY, Lifecycle
from .loading import load, open_for_writing
from .rebasing import mark_absent, replace_lost, undecoded
from .rewriting import rewrite

_SMALL = 16 * 1024  # bytes; smaller attached files stay in the record
# Values lost for these reasons stay stored, for a worker that can read them.
_FOR_OTHERS = ("unknown encryption key", "not encrypted")


class SessionLargeValues:
    """A session's operations on values that are stored outside its record."""

    __slots__ = ("_life", "_lost_once")

    def __init__(self, life: Lifecycle) -> None:
        self._life = life
        self._lost_once: dict[str, bytes] = {}

    def attach(self, key: str, file: Any, mark: Mark) -> int | bytes:
        """Write a file as the value of ``key``. Returns its length, or all of a small file."""
        life, repository = self._life, self._life.repository
        values = open_for_writing(life, ONE_KEY, key)
        check_store(life)
        if repository.large.storage is None:
            raise SettingError(
                f"session.attach({ascii(key)[:60]}) needs a place for large values: this "
                "SESSION_STORE has none"
            )
        pieces = pieces_from(file, repository.large.storage.frame_bytes)
        first = next(pieces, b"")
        limit = repository.settings.spill_bytes
        if (
            len(first) <= (_SMALL if limit is None else limit)
            and len(first) < repository.large.storage.frame_bytes
        ):
            return first
        if repository.check is not None:
            checked = repository.check(key, first)  # the rest isn't in memory
            mark = checked if mark == PLAIN else mark._replace(version=checked.version)
        body = Body(values.stored, life.lifetime)
        record = life.seen.record
        absolute = record.absolute_expires_at if record else None
        end = repository.expiry.end_of_blobs(body, absolute)
        try:
            reference = repository.large.storage.write(
                f"session[{ascii(key)[:60]}]",
                BYTES,
                chain([first], pieces),
                lambda: repository.expiry.end_of_blobs(body, absolute),
                room=repository.large.room_for(key, values.stored),
            )
        except StoreUnavailable as error:
            life.note_outage(error, "written to")
            raise
        with life.mutex:
            life.unreferenced.add(reference, end)
            values.set_encoded(key, marked(reference.pack(), mark), repository.now)
        return reference.length

    def reader(self, key: str) -> ValueReader | None:
        """A reader of the large bytes under ``key``; None if its value is in memory."""
        life = self._life
        while True:
            raw = undecoded(load(life), key)
            if raw is None or not refers(raw):
                return None
            try:
                reference = reference_in(raw)
            except UnreadableRecord as error:
                refuse(life, error.reason, error.detail)
                raise KeyError(key) from None
            if reference.kind != BYTES:
                raise TypeError(f"session[{ascii(key)[:60]}] isn't bytes: only bytes can be opened")
            large_values = life.repository.large.storage
            try:
                if large_values is None:
                    raise ValueLost("missing")
                return ValueReader(reference, partial(large_values.frame, reference))
            except ValueLost as error:
                self.lost(key, raw, error)

    def decoded(self, key: str, raw: bytes) -> tuple[Mark, Any]:
        """The mark and value of a key. If its large value is lost, uses the one stored by now.

        Raises ``KeyError`` if there is none, and ``UnreadableRecord``.
        """
        while True:
            mark, plain = split(raw)
            try:
                return mark, self._life.repository.codec.decode(plain)
            except ValueLost as error:
                self.lost(key, raw, error)
            newer = self._life.values.raw(key)
            if newer is None:
                raise KeyError(key)
            raw = newer

    def lost(self, key: str, raw: bytes, error: ValueLost) -> None:
        """Handle a large value that couldn't be read, at the reference ``raw``.

        Another request may have replaced it a while ago. Returns if another attempt is worthwhile.
        Otherwise marks the key as absent, and raises ``KeyError``.
        """
        life, values = self._life, self._life.values
        if self._lost_once.get(key) != raw:
            self._lost_once[key] = raw
            newer = raw if values.has_changed(key) else self._stored_now(key)
            with values.mutex:
                if newer == raw or values.has_changed(key):  # perhaps by another thread meanwhile
                    return
                if newer is None:  # its key or its session is gone
                    mark_absent(values, key)
                    raise KeyError(key)
                replace_lost(values, key, newer, life.repository.now)
                return
        handle = life.handle
        logger.warning(
            "Session %s: the large value under %a is lost: %s", handle, key[:60], error.reason
        )
        life.repository.events.emit(LargeValueLost, key, error.reason, handle)
        with values.mutex:
            if undecoded(values, key) == raw or not values.has_changed(key):
                mark_absent(values, key)
        kept = error.reason in _FOR_OTHERS or in_retried_code(life)
        if life.seen.record is not None and not kept:
            try:
                rewrite(
                    life,
                    key,
                    lambda there: None if there == raw else there,
                    "a repair",
                    settle=lambda _: None,
                    recover=self.recover(key),
                )
            except GSessionError as failure:
                logger.warning("A lost value could not be removed: %s", failure)
        raise KeyError(key)

    def recover(self, key: str) -> Any:
        """The function for ``rewrite`` to call if the large value under ``key`` is lost."""

        def lost(raw: bytes, error: ValueLost) -> None:
            with suppress(KeyError):
                self.lost(key, raw, error)
                return
            if self._life.values.stored.get(key) == raw:
                raise SessionConflict from None  # others may be able to read it

        return lost

    def _stored_now(self, key: str) -> bytes | None:
        """The value in the store now; None if the key or the session is gone."""
        life = self._life
        if life.seen.record is None:
            return None
        try:
            loaded = life.repository.find(life.seen.record.key)
        except UnreadableRecord:
            return None
        raw = None if loaded is None else loaded.body.values.get(key)
        return None if expired(raw, life.repository.now()) else raw
