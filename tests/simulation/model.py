"""A model of sessions: plain dicts, plain rules, and no line of the code under test.

The model hears of every effect on the store, in the order in which they happen, and checks each
one against what the guarantees allow. Three kinds of things live here:

- a `View`: the values that one request sees and changes,
- a `Mirror`: one request's knowledge, which decides what it may and must do,
- a `Line`: one session through all its rotations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

from flask_gsession.stores.base import MAX_POINTERS, Record

Values = dict[str, Any]


class Violation(BaseException):
    """A guarantee was broken. No `Exception`, so that the code under test cannot catch it."""


class _Missing:
    def __repr__(self) -> str:
        return "nothing"


MISSING: Final = _Missing()


# Merging ---------------------------------------------------------------------------------------


class Conflict(Exception):
    """The changes cannot both stand."""


def _or(missing: Any, *values: Any) -> list[Any]:
    return [missing if value is MISSING else value for value in values]


def _counter(base: Any, theirs: Any, mine: Any) -> Any:
    before, stored, wanted = _or(0, base, theirs, mine)
    return stored + wanted - before


def _set(base: Any, theirs: Any, mine: Any) -> Any:
    before, stored, wanted = _or(set(), base, theirs, mine)
    added, removed = wanted - before, before - wanted
    return {item for item in stored if item not in removed} | added


def _dict(base: Any, theirs: Any, mine: Any) -> Any:
    before, stored, wanted = _or({}, base, theirs, mine)
    merged = dict(stored)
    for key in before.keys() | wanted.keys():
        if before.get(key, MISSING) != wanted.get(key, MISSING):
            if key in wanted:
                merged[key] = wanted[key]
            else:
                merged.pop(key, None)
    return merged


def _append(base: Any, theirs: Any, mine: Any) -> Any:
    before, stored, wanted = _or([], base, theirs, mine)
    if wanted[: len(before)] != before:
        raise Conflict
    return stored + wanted[len(before) :]


def _reject(base: Any, theirs: Any, mine: Any) -> Any:
    raise Conflict


def _last(base: Any, theirs: Any, mine: Any) -> Any:
    return mine


RULES: Final[dict[str, Callable[[Any, Any, Any], Any]]] = {
    "counter": _counter,
    "set": _set,
    "dict": _dict,
    "append": _append,
    "reject": _reject,
    "last": _last,
}


class Fleeting(NamedTuple):
    """A value that expires by itself, as it is kept; in milliseconds."""

    value: Any
    end: int


def unexpired(values: Mapping[str, Any], now: int) -> Values:
    """The values without those that have expired."""
    return {key: value for key, value in values.items() if not expired(value, now)}


def expired(value: Any, now: int) -> bool:
    return type(value) is Fleeting and value.end <= now


def plain(value: Any) -> Any:
    """The value itself, without its expiry."""
    return value.value if type(value) is Fleeting else value


def like(kept: Any, value: Any) -> Any:
    """A value, with the expiry of another."""
    return Fleeting(value, kept.end) if type(kept) is Fleeting else value


class View(MutableMapping[str, Any]):
    """One request's own picture of its session.

    What it looked at stays as it is for the whole request; what it did not look at is the newest
    that it heard of. A change is a difference between what it first saw and what it has now. What
    has expired is not there, and to look for it is to see nothing.
    """

    def __init__(self, now: Callable[[], int]) -> None:
        self.now = now
        self.known: Values = {}
        self.base: Values = {}
        self.live: Values = {}

    def __getitem__(self, key: str) -> Any:
        if self._has_expired(key):
            raise KeyError(key)
        if key not in self.live:
            if key in self.base:
                raise KeyError(key)
            self.base[key] = self.known.get(key, MISSING)
            if self.base[key] is MISSING:
                raise KeyError(key)
            self.live[key] = copied(self.base[key])
        return plain(self.live[key])

    def __setitem__(self, key: str, value: Any) -> None:
        self.base.setdefault(key, self.known.get(key, MISSING))
        self.live[key] = value

    def __delitem__(self, key: str) -> None:
        if key not in self:
            raise KeyError(key)
        self.base.setdefault(key, self.known.get(key, MISSING))
        self.live.pop(key, None)

    def __contains__(self, key: object) -> bool:
        if self._has_expired(key):
            return False
        return key in self.live or (key in self.known and key not in self.base)

    def ends(self, key: str) -> int | None:
        """When the value of a key expires by itself. Raises `KeyError`."""
        if key not in self:
            if not self._has_expired(key):
                self.base.setdefault(key, MISSING)
            raise KeyError(key)
        kept = self._kept(key)
        return kept.end if type(kept) is Fleeting else None

    def change(self, key: str, value: Any) -> None:
        """Set a value in the place of another, whose expiry stays."""
        self[key] = like(self._kept(key), value) if key in self else value

    def _kept(self, key: Any) -> Any:
        return self.live[key] if key in self.live else self.known.get(key)

    def _has_expired(self, key: object) -> bool:
        return expired(self._kept(key), self.now())

    def __iter__(self) -> Iterator[str]:
        return iter([key for key in {**self.known, **self.live} if key in self])

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def changes(self) -> dict[str, tuple[Any, Any]]:
        """The value of each changed key when first seen, and its new value."""
        pairs = ((key, base, self.live.get(key, MISSING)) for key, base in self.base.items())
        return {key: (base, mine) for key, base, mine in pairs if base != mine}

    def committed(self, changes: Mapping[str, tuple[Any, Any]]) -> None:
        """These changes are stored; later ones are changes of their own."""
        for key, (_, mine) in changes.items():
            self.base[key] = copied(mine)

    def forget(self) -> None:
        self.known, self.base, self.live = {}, {}, {}


def shown(value: Any) -> str:
    """A value as text that is the same in every process."""
    if type(value) is dict:
        return "{" + ", ".join(f"{key!r}: {shown(item)}" for key, item in value.items()) + "}"
    return f"{{{str(sorted(value))[1:-1]}}}" if type(value) is set else repr(value)


def copied(value: Any) -> Any:
    """A deep copy."""
    if type(value) is list:
        return [copied(item) for item in value]
    if type(value) is Fleeting:
        return Fleeting(copied(value.value), value.end)
    if type(value) is dict:
        return {key: copied(item) for key, item in value.items()}
    return set(value) if type(value) is set else value


def worth_keeping(values: Mapping[str, Any]) -> bool:
    """Whether a session with these values exists."""
    return any(key != "_permanent" for key in values)


# Knowledge of sessions and requests -------------------------------------------------------------


@dataclass(eq=False)
class Line:
    """One session, through all its rotations. Times are milliseconds."""

    name: str
    head: str
    values: Values
    shortest: int  # the shortest and the longest idle timeout that were ever asked for
    longest: int
    keys: list[str] = field(default_factory=list)
    used: int = 0  # when the last request that was served without a fault loaded it
    longest_flight: int = 0  # of a write: from when it was made up to when it landed
    #: It began with another session's values, or nobody knows it, so the audit ignores it.
    apart: bool = False


@dataclass(eq=False)
class Attempt:
    """A write whose outcome its request does not know, or not yet."""

    key: str
    changes: dict[str, tuple[Any, Any]]
    rotation: float | None
    #: the update_atomic or take that it is
    atomic: tuple[str, Callable[[Any], Any] | None, Any] | None
    # of its request, as it was sent
    state: str
    has_token: bool
    timeouts: set[int]
    line: Line | None = None  # where it was applied
    late: bool = False  # it is applied after its request was interrupted
    #: its request has forgotten the changes since; if they are stored, then as somebody else's
    discarded: bool = False


@dataclass(eq=False)
class Mirror:
    """One request's knowledge of its session, which determines its allowed and required effects."""

    name: str
    browser: str
    presented: str | None  # the key that belongs to the token it brought
    now: Callable[[], int]
    state: str = "unopened"  # then "none", "live" or "ended"
    without: str = "none"  # its state where a load finds nothing
    key: str | None = None
    line: Line | None = None
    view: View = field(init=False)
    #: counts the times that the session changed its identity under the request
    epoch: int = 0
    cleared: bool = False
    emptied: bool = False  # a take left an empty session
    rotation: float | None = None
    timeouts: set[int] = field(default_factory=set)  # milliseconds
    #: the update_atomic that is running: key, function, default; None for the function: a take
    atomic: tuple[str, Callable[[Any], Any] | None, Any] | None = None
    atomic_result: Any = MISSING
    stores_first: bool = False  # all that is pending, since its own key is
    destroying: bool = False
    reloading: bool = False
    ended_itself: bool = False  # and so may have its cookie deleted
    cookie_due: bool = False
    made: set[str] = field(default_factory=set)
    faulted: bool = False
    interrupted: bool = False
    unsure: bool = False  # cannot know whether its write is part of the stored session
    is_apart: bool = False  # it signed in with an old token
    crossed: bool = False
    dropped: bool = False  # said that changes were dropped, because the session had ended
    unsaved: bool = False  # said that changes were not stored, because the store failed
    loaded: int = 0  # when it loaded or created its session; milliseconds
    #: whether it holds the newest token of its session, and no old one
    has_token: bool = True
    version: int = 0  # of what it knows
    #: writes without an answer, by version
    attempts: dict[int, Attempt] = field(default_factory=dict)
    #: everything that it sent, by version
    sent: dict[int, Attempt] = field(default_factory=dict)
    lines: list[Line] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.view = View(self.now)

    def become(self, state: str) -> None:
        """Continue without the knowledge so far."""
        self.epoch += self.state != "unopened"
        self.state, self.key, self.line = state, None, None
        self.view = View(self.now)
        self.cleared = self.emptied = self.cookie_due = False
        self.rotation = None
        self.forget_attempts()
        self.timeouts = set()

    def forget_attempts(self) -> None:
        """It will never know the outcome of its last writes."""
        for attempt in self.attempts.values():
            if attempt.line is not None:
                attempt.line.apart = True
        self.attempts = {}

    def hold(self, line: Line, version: int) -> None:
        """Go on with this session, whose newest state arrived just now."""
        if line.head != (self.presented if self.state == "unopened" else self.key):
            # It holds an old token now, which never leads to a new one. A sign-in stands, and
            # begins a session of its own.
            self.has_token = self.cookie_due = False
            if self.rotation != 0:
                self.rotation = None
        elif self.state == "unopened":
            self.has_token = True
        self.version = version
        self.state, self.key, self.line = "live", line.head, line
        self.without = "none"
        self.view.known = line.values
        if line not in self.lines:
            self.lines.append(line)

    def own(self, key: str) -> None:
        """The newest token of its session is of its own making, and is to be sent."""
        self.key, self.has_token, self.cookie_due = key, True, True
        self.made.add(key)

    def part(self) -> None:
        """If it signs in with an old token: go on with a session of its own.

        That has what this request assigned, and no more; the other one is left alone.
        """
        if self.state != "live" or self.has_token or self.rotation != 0:
            return
        kept = {
            key: mine
            for key, (base, mine) in self.view.changes().items()
            if mine is not MISSING
            and (base is MISSING or type(plain(mine)) not in (list, set, dict))
        }
        timeouts = self.timeouts
        self.become("none")
        self.timeouts = timeouts if "_permanent" in kept else set()
        for key, value in kept.items():
            self.view[key] = copied(value)
        self.is_apart = True

    def send(self, record: Record) -> None:
        """It sends a write that stores this record."""
        if self.key != record.key:
            self.part()
        changes = self.view.changes()
        atomic = None if self.state == "none" else self.rewrites(changes)
        if atomic is not None:
            changes = {}
        self.sent[record.version] = self.attempts[record.version] = Attempt(
            record.key,
            {key: (copied(base), copied(mine)) for key, (base, mine) in changes.items()},
            None if atomic is not None else self.rotation,
            atomic,
            self.state,
            self.has_token,
            set(self.timeouts),
        )

    def discard_attempts(self) -> None:
        """Forget the values of pending writes, which may still be stored."""
        for attempt in self.attempts.values():
            attempt.discarded = True

    def begin_atomic(self, key: str, function: Callable[[Any], Any] | None, default: Any) -> None:
        """An update_atomic or a take begins."""
        self.atomic, self.atomic_result = (key, function, default), MISSING
        self.stores_first = key in self.view.changes()

    def rewrites(
        self, changes: Mapping[str, Any]
    ) -> tuple[str, Callable[[Any], Any] | None, Any] | None:
        """The update_atomic that writes now, without the save before it."""
        if self.atomic is None or self.atomic[0] in changes or (self.stores_first and changes):
            return None
        return self.atomic

    def fulfilled(self, attempt: Attempt) -> None:
        """This write is known to have been applied."""
        if not attempt.discarded:
            self.view.committed(attempt.changes)
        if attempt.rotation == self.rotation:
            self.rotation = None
        for other in self.attempts.values():
            if other.line is not None and other.line is not attempt.line:
                other.line.apart = True
        self.attempts = {}


class Model:
    """Keeps its own copy of the store, and checks each effect. Times are milliseconds."""

    def __init__(
        self,
        *,
        now: Callable[[], int],
        decode: Callable[[Record], Values],
        idle: int,
        absolute: int,
        slack: int,
        policies: Mapping[str, str],
        default_policy: str,
        trace: Callable[[str], None] | None,
    ) -> None:
        self._now = now
        self._decode = decode
        self._idle, self._absolute = idle, absolute
        self._slack = slack
        self._policies, self._default_policy = policies, default_policy
        self.tracing = trace is not None
        self.trace = trace or (lambda line: None)
        self.records: dict[str, Record | None] = {}  # None: dead, for ever
        self.line_of: dict[str, Line] = {}
        self.lines: list[Line] = []

    # -- looking

    def name(self, key: str | None) -> str:
        """A short name of a key, for traces."""
        if key is None:
            return "nothing"
        line = self.line_of.get(key)
        return f"{line.name}.{line.keys.index(key)}" if line else "?"

    def head_of(self, key: str | None) -> Record | None:
        """The live record that a token with this key leads to now."""
        for _ in range(MAX_POINTERS):
            record = self._unexpired(key)
            if record is None or record.successor is None:
                return record
            key = record.successor
        return None

    def line_behind(self, key: str | None) -> Line | None:
        """The session that a token with this key leads to now."""
        head = self.head_of(key)
        return self.line_of[head.key] if head else None

    def _unexpired(self, key: str | None) -> Record | None:
        record = self.records.get(key) if key else None
        if record is None:
            return None
        now = self._now()
        if now < record.idle_expires_at:
            return record
        if record.successor is None and now < record.absolute_expires_at:
            line = self.line_of[record.key]
            early = line.used + line.shortest - line.longest_flight - now
            if early > 0:
                raise Violation(f"{line.name} idled out {early} ms early")
        return None

    # -- answers to a request

    def loaded(self, mirror: Mirror, key: str, record: Record | None) -> None:
        """The store read `record` under `key` for this request."""
        self._own(mirror, key, "load")
        expected = self._unexpired(key)
        if record == expected:
            return
        if expected is None:
            raise Violation(f"read {self.name(key)}, which had ended or expired")
        raise Violation(f"read {self.name(key)} as {record}, and {expected} was stored")

    def heard(
        self, mirror: Mirror, key: str, record: Record | None, *, foreign: bool = False
    ) -> None:
        """The request got this answer to a load. ``foreign``: an answer that it can't use."""
        if record is not None and record.successor is not None:
            return  # it will ask for the successor
        if mirror.state == "unopened":
            mirror.loaded = self._now()
            if record is None:
                mirror.become(mirror.without)
            else:
                mirror.hold(self.line_of[record.key], record.version)
        elif record is None and mirror.state == "none":
            pass  # its sent writes may still arrive
        elif record is None:
            asked = {version for version, sent in mirror.attempts.items() if sent.key == key}
            elsewhere = {
                version: sent
                for version, sent in mirror.attempts.items()
                if version not in asked and sent.key != mirror.key
            }
            if elsewhere and not foreign:
                mirror.attempts = elsewhere  # it looks there next
                return
            mirror.without = "ended"
            mirror.become("ended")
        else:
            self._recognise(mirror, record)

    def _recognise(self, mirror: Mirror, record: Record) -> None:
        """A request caught up with its session; its own writes are no surprise to it."""
        line, moved = self.line_of[record.key], record.key != mirror.key
        own = mirror.attempts.get(record.version)
        for attempt in mirror.attempts.values():
            if moved and attempt.key == record.key:  # only its own write has made that key
                own = attempt
        if own is not None:
            mirror.fulfilled(own)
            if own.late and own.state == "none":
                line.apart = mirror.is_apart
            if moved:
                mirror.own(record.key)
        elif record.version == mirror.version:  # its writes may still arrive
            if mirror.reloading:
                mirror.discard_attempts()
            mirror.hold(line, record.version)
            return
        elif not mirror.reloading:
            pending = mirror.view.changes()
            for attempt in mirror.attempts.values():
                doubtful = () if attempt.discarded else attempt.changes.keys() & pending.keys()
                if any(self.policy_of(name) != "last" for name in doubtful):
                    mirror.unsure = True
                    return
        mirror.attempts = {}
        mirror.hold(line, record.version)

    # -- effects of a request

    def create(self, mirror: Mirror, record: Record, begun: int) -> Callable[[], None]:
        """A session was stored for the first time. Returns the reaction to the answer."""
        attempt = mirror.sent[record.version]
        changes = attempt.changes
        wanted = {key: mine for key, (_, mine) in changes.items() if mine is not MISSING}
        wanted = unexpired(wanted, begun)
        if attempt.state != "none":
            raise Violation(f"created, though its session is {attempt.state}")
        if record.key in self.records and not attempt.late:
            raise Violation("created under a key that was used before")
        if not attempt.late:
            self._check_once(mirror, changes)
        if not worth_keeping(wanted):
            raise Violation("created a session that holds nothing")
        line = Line(f"S{len(self.lines) + 1}", record.key, wanted, self._idle, self._idle)
        line.apart = mirror.is_apart or attempt.late  # or until its request finds it
        self.lines.append(line)
        mirror.lines.insert(0 if attempt.late else len(mirror.lines), line)
        if record.absolute_expires_at != begun + self._absolute or record.created_at != begun:
            raise Violation(f"created with the times of another moment than {begun}: {record}")
        self._put(attempt, line, record, wanted, begun)
        self._landed(mirror, attempt, record, line)

        def arrived() -> None:
            mirror.own(record.key)
            mirror.hold(line, record.version)
            mirror.fulfilled(attempt)
            mirror.rotation = None
            mirror.loaded = begun

        return arrived

    def save(self, mirror: Mirror, record: Record, expected: int, begun: int) -> Callable[[], None]:
        """A session was replaced. Returns the reaction to the answer."""
        line, wanted, arrived = self._write(mirror, record.key, record, expected, begun)
        self._put(mirror.sent[record.version], line, record, wanted, begun)
        return arrived

    def replace(
        self,
        mirror: Mirror,
        key: str,
        record: Record,
        expected: int,
        pointer: Record | None,
        begun: int,
    ) -> Callable[[], None]:
        """A session got a new token. Returns the reaction to the answer."""
        attempt = mirror.sent[record.version]
        grace = attempt.rotation
        if grace is None:
            raise Violation("rotated without having been asked to")
        if not attempt.has_token:
            raise Violation("an old token was rotated into one that lasts")
        if record.key in self.records:
            raise Violation("rotated to a key that was used before")
        line, wanted, arrived = self._write(mirror, key, record, expected, begun)
        if grace == 0:
            if pointer is not None:
                raise Violation("a rotation without grace left a pointer")
        elif pointer is None:
            raise Violation("a rotation with grace left no pointer")
        else:
            self._check_pointer(pointer, key, record, begun + int(grace * 1000))
        old, self.records[key] = self.records[key], pointer
        line.head = record.key
        self._put(attempt, line, record, wanted, begun, old)

        def rotated() -> None:
            mirror.own(record.key)  # its own rotation is no surprise to it
            arrived()
            mirror.rotation = None

        return rotated

    def renew(self, mirror: Mirror, record: Record, idle_end: int, done: bool, begun: int) -> None:
        """A session's idle expiry was moved, or not."""
        self._own(mirror, record.key, "renew")
        there = self._unexpired(record.key)
        right = there is not None and there.version == record.version
        if done and not right:
            raise Violation(f"renewed {self.name(record.key)}, which had ended or changed")
        if right and not done:
            raise Violation(f"did not renew {self.name(record.key)}, which was as it was loaded")
        if there is not None and right:
            later = min(max(idle_end, there.idle_expires_at), there.absolute_expires_at)
            renewed = there._replace(idle_expires_at=later)
            self._check_times(mirror.timeouts, self.line_of[record.key], renewed, there, begun)
            self.records[record.key] = renewed

    def delete(
        self, mirror: Mirror, key: str, expected: int | None, done: bool, begun: int
    ) -> Callable[[], None]:
        """A session was ended. Returns the reaction to the answer."""
        self._own(mirror, key, "delete")
        # It signed in with an old token, and emptied the session that this began: a logout of both.
        logs_out = mirror.is_apart and mirror.state == "none" and mirror.cleared
        if logs_out and worth_keeping(mirror.view):
            raise Violation("logged out, and holds something")
        if not (mirror.destroying or logs_out):
            if expected is None:
                raise Violation("deleted without having been asked to")
            line = self._current(key, expected, "deleted")
            if worth_keeping(self._merged(mirror, line, mirror.view.changes(), begun)):
                raise Violation("ended a session that still holds something")
        there = self.head_of(key) is not None
        if done != there:
            raise Violation(f"said {done} of the end of {self.name(key)}; it was {there}")
        target: str | None = key
        while target is not None:
            record = self._unexpired(target)
            self.records[target] = None
            target = record.successor if record else None

        def arrived() -> None:
            if not mirror.destroying:
                mirror.become("none")
                mirror.ended_itself = True

        return arrived

    def refused(self, mirror: Mirror, key: str, expected: int | None, error: str) -> None:
        """The store refused a write with this error."""
        self._own(mirror, key, "write")
        record = self._unexpired(key)
        live = record is not None and record.successor is None
        right = "Gone" if not live else "Stale" if record.version != expected else None  # type: ignore[union-attr]
        if error != right:
            raise Violation(f"the store answered {error} for {self.name(key)}, not {right}")

    # -- rules for writes

    def _own(self, mirror: Mirror, key: str, what: str) -> None:
        line = self.line_of.get(key)
        if any(key == attempt.key for attempt in mirror.attempts.values()):
            return
        if key != mirror.presented and line not in mirror.lines:
            theirs = self.line_of.get(mirror.presented or "")
            if line is None or line is not theirs:
                raise Violation(f"{what} of {self.name(key)}, which is not its own session")

    def _current(self, key: str, expected: int, what: str) -> Line:
        record = self._unexpired(key)
        if record is None:
            raise Violation(f"{what} {self.name(key)}, which had ended or expired")
        line = self.line_of[key]
        if record.successor is not None:
            raise Violation(f"{what} {self.name(key)}, which was rotated to {self.name(line.head)}")
        if record.version != expected:
            raise Violation(f"{what} {self.name(key)} over a newer state: {shown(line.values)}")
        return line

    def _write(
        self, mirror: Mirror, key: str, record: Record, expected: int, begun: int
    ) -> tuple[Line, Values, Callable[[], None]]:
        """Check a write that replaces a state. Returns the line, the values and the reaction."""
        self._own(mirror, key, "write")
        line = self._current(key, expected, "wrote")
        attempt = mirror.sent[record.version]
        if attempt.state != "live":
            raise Violation(f"wrote {self.name(key)}, though its session is {attempt.state}")
        old = self.records[key]
        assert old is not None
        if (record.created_at, record.absolute_expires_at) != (
            old.created_at,
            old.absolute_expires_at,
        ):
            raise Violation("a write changed the creation or the absolute expiry")
        # Another request's take may have stored the lifetime that it asked for.
        earliest = min(old.idle_expires_at, begun + line.shortest)
        if record.idle_expires_at < earliest and not attempt.timeouts:
            before, after = (bool(v.get("_permanent")) for v in (line.values, self._decode(record)))
            if before == after:
                raise Violation("the idle expiry moved back, and nobody had asked for that")
        self._landed(mirror, attempt, record, line)
        if attempt.atomic is not None:
            name, function, default = attempt.atomic
            wanted = unexpired(line.values, begun)
            kept = wanted.pop(name, MISSING)
            value = plain(default if kept is MISSING else kept)
            if function is None:
                after: Any = MISSING
                if kept is MISSING:
                    raise Violation("wrote, and there was nothing to take")
            else:
                value = function(copied(value))
                after = wanted[name] = like(kept, value)

            def arrived() -> None:
                mirror.attempts = {}
                mirror.hold(line, record.version)
                mirror.view.base[name] = after
                if after is MISSING:
                    mirror.view.live.pop(name, None)
                else:
                    mirror.view.live[name] = copied(after)
                mirror.atomic_result = value
                mirror.emptied = not worth_keeping(wanted)
        else:
            attempt.line = None  # it isn't stored beside itself
            wanted = self._merged(mirror, line, attempt.changes, begun)
            attempt.line = line
            if not worth_keeping(wanted):
                raise Violation("kept a session that holds nothing any more")

            def arrived() -> None:
                mirror.hold(line, record.version)
                mirror.fulfilled(attempt)
                mirror.cleared = mirror.emptied = mirror.stores_first = False

        return line, wanted, arrived

    @staticmethod
    def _landed(mirror: Mirror, attempt: Attempt, record: Record, line: Line) -> None:
        """A write was stored, perhaps when its request has forgotten it."""
        attempt.line = line
        if record.version not in mirror.attempts:
            line.apart = True

    def _merged(
        self, mirror: Mirror, line: Line, changes: Mapping[str, tuple[Any, Any]], now: int
    ) -> Values:
        """The stored values with these changes of a request."""
        self._check_once(mirror, changes)
        try:
            return self.merge(line.values, changes, now)
        except Conflict:
            raise Violation("stored what its policy refuses") from None

    def _check_once(self, mirror: Mirror, changes: Mapping[str, tuple[Any, Any]]) -> None:
        for key, change in changes.items():
            stored = (
                sent.changes
                for sent in mirror.attempts.values()
                if sent.line is not None
                and not sent.discarded
                # If it doesn't find its session, it has another one, unknown to any client.
                and not (sent.state == "none" and (sent.late or not self.head_of(sent.key)))
            )
            if any(before.get(key) == change for before in stored):
                raise Violation(f"stored the change of {key!r} a second time")

    def merge(self, stored: Values, changes: Mapping[str, tuple[Any, Any]], now: int) -> Values:
        """Apply changes to the stored values, without expired ones. Raises `Conflict`."""
        stored = unexpired(stored, now)
        merged = dict(stored)
        for key, sides in changes.items():
            base, mine = (MISSING if expired(side, now) else side for side in sides)
            if base == mine:
                continue
            theirs = stored.get(key, MISSING)
            policy = self.policy_of(key)
            value = mine
            if theirs != base and (mine is not MISSING or policy == "reject"):
                value = RULES[policy](base, theirs, mine)
            if value is MISSING:
                merged.pop(key, None)
            else:
                merged[key] = value
        return merged

    def policy_of(self, key: str) -> str:
        return self._policies.get(key, self._default_policy)

    def _put(
        self,
        attempt: Attempt,
        line: Line,
        record: Record,
        wanted: Values,
        begun: int,
        old: Record | None = None,
    ) -> None:
        """Take over the stored state, if it is correct."""
        values = self._decode(record)
        if values != wanted:
            raise Violation(f"stored {difference(wanted, values)}")
        old = old or self.records.get(record.key)
        self._check_times(attempt.timeouts, line, record, old, begun)
        self.records[record.key] = record
        if record.key not in self.line_of:
            self.line_of[record.key] = line
            line.keys.append(record.key)
        line.values = values

    def _check_times(
        self, timeouts: set[int], line: Line, record: Record, old: Record | None, begun: int
    ) -> None:
        line.shortest = min({line.shortest, *timeouts})
        line.longest = max({line.longest, *timeouts})
        line.longest_flight = max(line.longest_flight, self._now() - begun)
        if not record.idle_expires_at <= record.absolute_expires_at:
            raise Violation("a record would outlive its absolute expiry")
        latest = begun + line.longest + self._slack
        if old is not None:
            latest = max(latest, old.idle_expires_at)
        if record.idle_expires_at > latest:
            raise Violation(f"a record would expire {record.idle_expires_at - latest} ms late")

    def _check_pointer(self, pointer: Record, key: str, record: Record, end: int) -> None:
        if pointer.key != key or pointer.successor != record.key:
            raise Violation(f"a pointer to somewhere else: {pointer}")
        if pointer.idle_expires_at != min(end, record.absolute_expires_at):
            raise Violation("a pointer that does not end with the grace")

    # -- at the end

    def check_end(self, mirror: Mirror, status: int) -> None:
        """A request was answered: it has done its work, or reported that it has not."""
        if status != 200:
            return
        mirror.part()
        changes = mirror.view.changes()
        if mirror.state == "live":
            if mirror.emptied and not worth_keeping(unexpired(mirror.view.known, self._now())):
                raise Violation("answered 200, and left an empty session")
            if changes:
                raise Violation(f"answered 200, and has not stored {sorted(changes)}")
            if mirror.rotation is not None:
                raise Violation(f"answered 200, and has not rotated (grace {mirror.rotation:g})")
        elif mirror.state == "ended":
            if changes and not mirror.dropped:
                raise Violation(f"dropped {sorted(changes)} and did not say so")
        elif worth_keeping(
            {
                key: 1
                for key, (_, mine) in changes.items()
                if mine is not MISSING and not expired(mine, self._now())
            }
        ):
            raise Violation(f"answered 200, and has stored no session for {sorted(changes)}")

    def check_store(self, stored: Mapping[str, Record]) -> None:
        """At the end of a schedule: exactly the records that should be there, one line one head."""
        for key in {**self.records, **stored}:
            expected = self._unexpired(key)
            record = stored.get(key)
            if record is not None and not 0 < record.idle_expires_at <= record.absolute_expires_at:
                raise Violation(f"{self.name(key)} is stored without a proper expiry")
            if record is not None and record.idle_expires_at <= self._now():
                record = None
            if record != expected:
                raise Violation(f"{self.name(key)} is stored as {record}, not as {expected}")
        for line in self.lines:
            heads = [key for key in line.keys if (r := stored.get(key)) and r.successor is None]
            if len(heads) > 1:
                raise Violation(f"{line.name} has {len(heads)} successors")


def difference(wanted: Values, found: Values) -> str:
    """How two states differ, in words."""
    parts = [
        f"{key!r} as {shown(found.get(key, MISSING))}, not {shown(wanted.get(key, MISSING))}"
        for key in sorted(wanted.keys() | found.keys())
        if wanted.get(key, MISSING) != found.get(key, MISSING)
    ]
    return "; ".join(parts)
