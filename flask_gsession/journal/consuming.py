"""``ext.journal(name)``: the events of the journal, for a consumer that acknowledges them."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from ..errors import StoreUnavailable
from ..events import logger
from ..stores.base import Clock, milliseconds
from .entries import GAP, Entry, unpack
from .store import JournalingStore
from .sweeping import Sweeper

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", re.ASCII)
_AT_ONCE = 200  # entries per read
_POLL = 1.0  # seconds
_SLICE = 0.1  # seconds, within which a stop is noticed
MOST_SHOWN = 50  # events on the admin page
_LONGEST_PAUSE = 30.0  # seconds, while the store is unavailable


@dataclass(frozen=True, slots=True)
class JournalEvent:
    """One event of a session. Holds no token and no value.

    ``number``
        Its place in the journal, the same if the event is repeated.
    ``kind``
        ``"created"``, ``"bound"``, ``"rotated"``, ``"ended"``, ``"expired"``, or ``"gap"`` if
        ``missed`` events were removed before this consumer read them.
    ``time``
        When it happened; for ``"expired"``, when the session timed out.
    ``handle``, ``previous``
        The session's handle, which changes with each rotation; the handle before.
    ``owner``, ``device``
        The session's user, and the device id that stays the same through rotations.
    ``reason``, ``by``
        Why the session ended, and who ended it.
    ``id``
        After a crash, the journal may contain an event twice, with the same id.
    """

    number: int
    kind: str
    time: datetime
    handle: str | None = None
    owner: str | None = None
    device: str | None = None
    reason: str | None = None
    by: str | None = None
    previous: str | None = None
    missed: int = 0
    id: str = ""
    _acknowledge: Callable[[int], None] = field(default=lambda number: None, repr=False)

    def ack(self) -> None:
        """Acknowledge this event and all before it, so that you don't get them again. One round
        trip.

        Raises ``StoreUnavailable``; with ``follow``, the next read repeats it instead.
        """
        self._acknowledge(self.number)

    def as_dict(self) -> dict[str, Any]:
        """The fields that have a value, with the time as text, for JSON."""
        shown: dict[str, Any] = {
            "number": self.number,
            "time": self.time.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "kind": self.kind,
        }
        for name in ("handle", "owner", "device", "reason", "by", "previous"):
            value = getattr(self, name)
            if value is not None:
                shown[name] = value
        if self.id:
            shown["id"] = self.id
        if self.kind == GAP:
            shown["missed"] = self.missed
        return shown


def check_consumer(name: object) -> str:
    """Return ``name``. Raises ``ValueError`` unless it is valid for a consumer."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ValueError(
            f"the consumer is {name!r}; allowed: a name of 1 to 64 letters, digits and . _ -, "
            'such as "siem"'
        )
    return name


class Consumer:
    """Iterates over the events that ``name`` hasn't acknowledged, in order.

    Run one process per name: two processes would both get every event.

    ``follow``: wait for more events instead of ending, and wait during outages of the store. If a
    failover loses events that you have read, and reuses their numbers, you get all events again
    that you haven't acknowledged. ``sweep``: also run the ``Sweeper`` now and then. ``poll``:
    seconds between two reads.
    """

    def __init__(
        self,
        store: JournalingStore,
        clock: Clock,
        name: str,
        *,
        follow: bool = False,
        sweep: bool = True,
        poll: float = _POLL,
    ) -> None:
        self.name = check_consumer(name)
        self._store = store
        self._clock = clock
        self._follow = follow
        self._poll = poll
        self._sweeper = Sweeper(store, clock) if sweep else None
        self._unsent = 0  # an acknowledgement that failed
        self._at: int | None = None  # the number that was read last
        self._entry: bytes | None = None  # and its entry
        self._stopped = False

    def stop(self) -> None:
        """End the iteration after the current event; with ``follow``, after 0.1 seconds at most.

        A signal handler may call it.
        """
        self._stopped = True

    def __iter__(self) -> Iterator[JournalEvent]:
        for events in self.batches():
            for event in events:
                yield event
                if self._stopped:
                    return

    def batches(self) -> Iterator[list[JournalEvent]]:
        """The same events in lists of up to 200."""
        failures, self._at = 0, None
        while not self._stopped:
            try:
                events = self._look()
                failures = 0
            except StoreUnavailable as error:
                if not self._follow:
                    raise
                failures += 1
                logger.warning("The journal can't be read, and will be retried: %s", error)
                self._wait(min(_LONGEST_PAUSE, self._poll * 2 ** min(failures, 10)))
                continue
            if events:
                yield events
            elif not self._follow:
                return
            else:
                self._wait(self._poll)

    def _wait(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while not self._stopped and (left := end - time.monotonic()) > 0:
            time.sleep(min(left, _SLICE))

    def _look(self) -> list[JournalEvent]:
        """The next events. Sweeps first if a sweep is due."""
        if self._unsent:
            self._store.journal.acknowledge(self.name, self._unsent)
            self._unsent = 0
        if self._sweeper is not None:
            self._sweeper.run_if_due()
        at = self._at
        if at is None:
            at, self._entry = self._begin(), None
            if at is None:
                return []
        # Read the last one again, to see whether it is still there.
        entries = self._store.journal.read(max(0, at - 1), _AT_ONCE).entries
        again = entries.pop(0)[1] if entries and entries[0][0] == at else None
        if self._entry is not None and again != self._entry and (again or not entries):
            logger.warning("The journal lost events; reading again from the last acknowledged one")
            self._at = None
            return self._look()
        self._at, self._entry = entries[-1] if entries else (at, again)
        return _events(entries, at, self._clock, self._acknowledge)

    def _begin(self) -> int | None:
        """The number that was acknowledged last; None if there is nothing to read."""
        journal = self._store.journal
        at = journal.acknowledged(self.name)
        if at is None:
            entries, first = journal.read(0, 1)
            if entries:
                at = first - 1  # a new consumer gets all events in the journal
                journal.acknowledge(self.name, at)
        return at

    def _acknowledge(self, number: int) -> None:
        try:
            self._store.journal.acknowledge(self.name, number)
        except StoreUnavailable:
            if not self._follow:
                raise
            self._unsent = max(self._unsent, number)


def latest_events(store: JournalingStore, before: int = 0) -> list[JournalEvent]:
    """The last events, or the last before this number, latest first. Acknowledges none."""
    figures = store.journal.figures()
    end = min(before - 1, figures.last) if before else figures.last
    entries = store.journal.read(max(0, end - MOST_SHOWN), MOST_SHOWN).entries
    found = [_event(number, unpack(data), _nothing) for number, data in entries if number <= end]
    return found[::-1]


def _nothing(number: int) -> None:
    """Acknowledges nothing."""


def _events(
    entries: list[tuple[int, bytes]],
    after: int,
    clock: Clock,
    acknowledge: Callable[[int], None],
) -> list[JournalEvent]:
    """The events of entries that were read after this number, with a gap for missing ones. Entries
    in the middle may be missing if they were removed during the read.
    """
    events = []
    for number, data in entries:
        if number > after + 1:
            events.append(_gap(after + 1, number - 1, clock, acknowledge))
        events.append(_event(number, unpack(data), acknowledge))
        after = number
    return events


def _gap(first: int, last: int, clock: Clock, acknowledge: Callable[[int], None]) -> JournalEvent:
    now, name = _time(milliseconds(clock)), f"gap-{first}-{last}"
    missed = last - first + 1
    return JournalEvent(last, GAP, now, missed=missed, id=name, _acknowledge=acknowledge)


def _event(number: int, entry: Entry, acknowledge: Callable[[int], None]) -> JournalEvent:
    return JournalEvent(
        number,
        entry.kind,
        _time(entry.at),
        entry.handle,
        entry.owner,
        entry.device,
        entry.reason,
        entry.by,
        entry.previous,
        id=entry.id,
        _acknowledge=acknowledge,
    )


def _time(at: int) -> datetime:
    try:
        return datetime.fromtimestamp(at / 1000, UTC)
    except (
        ValueError,
        OverflowError,
        OSError,
    ):  # from a damaged record, which must not block consumers
        return datetime.fromtimestamp(0, UTC)
