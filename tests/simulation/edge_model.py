"""Model: edge nodes that work while cut off lose nothing, repeat nothing and revive nothing.

One session ``k`` at a centre, and two edges. Each edge keeps one row for it: the copy that it
serves (``mine``), and, while it isn't settled, the ``base`` that it changed. Values are the names
of the changes in them, each as often as it was applied. A change is merged as a counter would be.

A step is one verb at the centre or one transaction on an edge's file. A call to the centre fails if
the edge is cut off; and its answer takes a step of its own, so a cut may come between.

The protocol, as in ``stores/edge/``

1. whoever finds a row with changes or an end serves and changes that row, connected or not. With a
   plain row or none the centre is asked; if it can't be reached, the copy serves, and a change goes
   into the row together with its base. A save whose answer is lost is refused, not queued;
2. what came from the centre replaces a plain row only. An end stays in its row, as a tombstone;
3. a logout ends the session at the centre, then the row. If the centre can't be reached, has no
   such session, or the row has changes, the row is ended at once and the centre asked later: to
   end what the key leads to, and the session's device in the user's roster, in two steps as in a
   revocation, since the session may have been rotated without a trace;
4. changes are settled in four steps: note in the row what is sent, with a number; load; merge the
   difference of ``sent`` and ``base`` into that, with the mark (edge, number) beside the values,
   if the mark isn't there already; note that it is done. What was changed since stays queued, with
   ``sent`` as its new base. A session that isn't at the centre any more has ended;
5. a session made here is created at the centre once: that is noted first. After a lost answer it is
   loaded, and it has ended if it isn't there: an end, of which the centre hears. A settler that was
   stopped sees by it that it created the session too late, and deletes it again;
6. a settler that dies is replaced by one that begins with the row. Two at once do no harm;
7. a rotation withdraws the copy first, then asks the centre, then notes the result, unless the row
   has changes by now. Noting it may fail, as on a full disk.

Invariants

- no end is undone: after an acknowledged logout the edge that took it never serves the session,
  and once all edges have settled, nobody does;
- nothing is lost: a change that was acknowledged is at the centre in the end, if the session is;
  it is given up only if the session ended (limits: it was rotated without a trace, or its creation
  was noted and then not sent or not answered);
- nothing is repeated: no change counts twice;
- a session that was given up doesn't live on (limit: a settler that was stopped before it sent the
  creation dies right after it), and no copy is left under a token that was rotated
  away without a grace.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Hashable, Mapping
from typing import Any, NamedTuple

from .explorer import NOTHING, Break, Broken, Explored, Model, Program, Record, Scenario, World

KEY, NEXT = "k", "k2"
PLAIN, CHANGED, CREATED, ENDED = "plain", "changed", "created", "ended"

BREAKS = {
    name: Break(meaning, scenario)
    for name, (meaning, scenario) in {
        "by version": ("4 knows its own write by the version alone", "settle, write elsewhere"),
        "no note": ("4 takes what is in the row when it repeats", "settle, write here"),
        "overwrites": ("4 is done with the row, whatever was changed since", "settle, write here"),
        "recreates": ("4 creates a session that isn't there", "cut, logout elsewhere"),
        "blind save": ("4 saves over any version", "settle, write elsewhere"),
        "drops base": ("4 stores what is here, without a merge", "settle, write elsewhere"),
        "no pushed": ("5 creates again after a lost answer", "create, logout elsewhere"),
        "key only": ("3 ends only what the key leads to", "logout here, rotation"),
        "revokes late": (
            "3 deletes before it marks the device",
            "logout here, rotation",
        ),
        "no tombstone": ("3 removes the row", "logout here, read"),
        "loads over": ("2 replaces any row", "read, write here"),
        "asks anyway": ("1 asks the centre despite the row", "logout here, read"),
        "queues unknown": ("1 queues a save whose answer is lost", "write, cut"),
        "numbers again": ("4 uses a number again", "settle, write here"),
        "forgets": ("4 is done when the answer is lost", "second cut"),
        "forgets creation": ("5 leaves no tombstone", "create, two settlers"),
        "tells nobody": ("5 doesn't report it to the centre", "create, two settlers"),
        "keeps late": ("5 keeps what it created too late", "create, two settlers"),
        "keeps copy": ("7 withdraws nothing", "rotation here, full disk"),
        "rotates over": ("7 replaces a row with changes", "rotation here, write"),
    }.items()
}


class Value(NamedTuple):
    changes: tuple[str, ...]
    marks: frozenset[tuple[str, int]] = frozenset()

    def with_change(self, name: str) -> Value:
        return self._replace(changes=tuple(sorted((*self.changes, name))))


class Row(NamedTuple):
    state: str
    mine: Value | None = None
    base: Value | None = None
    sent: Value | None = None
    number: int = 0
    pushed: bool = False
    told: bool = False


def merged(base: Value | None, theirs: Value, mine: Value) -> Value:
    added = list(mine.changes)
    for name in () if base is None else base.changes:
        added.remove(name)
    return theirs._replace(changes=tuple(sorted((*theirs.changes, *added))))


class EdgeWorld(World):
    """The centre, the rows of the edges, the links, and the promises to clients."""

    def __init__(self, broken: Broken = NOTHING, *, stored: bool = True, cut: str = "") -> None:
        super().__init__(limits=())
        self.broken = broken
        start = Value(())
        self.rows: dict[str, Row | None] = {"a": None, "b": None}
        if stored:
            self.put(KEY, start, 9)
            self.rows = {"a": Row(PLAIN, start), "b": Row(PLAIN, start)}
        self.cut: frozenset[str] = frozenset(cut)
        self.member: str | None = KEY  # the key of the device in the roster
        self.revoked = False
        self.acknowledged: frozenset[str] = frozenset()
        self.ended: frozenset[str] = frozenset()  # where a logout was acknowledged
        self.ending = False  # a logout has begun, and may have ended the session
        self.untraced = False  # rotated without a pointer
        self.unsure = False  # a creation was noted, and perhaps not sent
        self.given_up = False  # a creation that seemed lost was reported
        self.late = False  # it was created after that, and nobody has noticed yet
        self.rotated: frozenset[str] = frozenset()  # where the token was, without a grace
        self.numbers = {"a": 0, "b": 0}  # of sent changes, never used twice

    def state(self) -> Hashable:
        promised = (
            *(self.acknowledged, self.ended, self.ending, self.untraced, self.unsure),
            *(self.given_up, self.late, self.rotated),
        )
        here = tuple(self.rows.items()), tuple(self.numbers.items()), self.cut
        return super().state(), here, self.member, self.revoked, promised

    def reachable(self, key: str = KEY) -> Record | None:
        """The session that a client's token leads to."""
        there = self.store.get(key)
        while there is not None and there.to is not None:
            there = self.store.get(there.to)
        return there

    def row(self, edge: str) -> Row | None:
        return self.saw(self.rows[edge])  # type: ignore[no-any-return]

    def store_row(self, edge: str, row: Row | None) -> None:
        self.rows[edge] = row
        self.saw(None)

    def serve(self, edge: str, value: Value | None) -> None:
        if value is not None and edge in self.ended:
            self.fault = "an ended session is served where it was ended"


class Lost(NamedTuple):
    """A call that failed: ``sent``, if it may have been carried out."""

    sent: bool


Call = Generator[None, None, Any]


def asked(world: EdgeWorld, edge: str, verb: Callable[[], Any]) -> Call:
    """A call to the centre."""
    yield
    if edge in world.cut:
        world.saw("cut")
        return Lost(sent=False)
    answer = verb()
    yield
    world.saw(edge in world.cut)
    return Lost(sent=True) if edge in world.cut else answer


def led(world: EdgeWorld, edge: str) -> Call:
    """The key and the record that the client's token leads to, at the centre."""
    key = KEY
    while True:
        there = yield from asked(world, edge, lambda key=key: world.load(key))  # type: ignore[misc]
        if isinstance(there, Lost) or there is None or there.to is None:
            return key, there
        key = there.to


def _saved(world: EdgeWorld, edge: str, key: str, value: Value, version: Any) -> Call:
    return (yield from asked(world, edge, lambda: world.save(key, value, version) is not None))


# -- requests


def write(world: EdgeWorld, edge: str, name: str) -> Program:
    yield
    row = world.row(edge)
    lost = False
    if row is None or row.state == PLAIN or "asks anyway" in world.broken:
        key, there = yield from led(world, edge)
        if there is None:
            return
        if not isinstance(there, Lost):
            value = there.value.with_change(name)
            saved = yield from _saved(world, edge, key, value, there.version)
            if saved is True:
                yield
                _copied(world, edge, value)
                world.acknowledged |= {name}
                world.saw(None)
            if not isinstance(saved, Lost) or (saved.sent and "queues unknown" not in world.broken):
                return
        lost = True
    yield
    now = world.rows[edge]
    if now is None or now.mine is None or now.state == ENDED:
        return world.store_row(edge, now)
    if now != row and not lost:
        return world.store_row(edge, now)  # another worker was faster: refused
    _queue(world, edge, now, name)


def write_alone(world: EdgeWorld, edge: str, name: str) -> Program:
    """A write by a worker that can't reach the centre, though others of its node can."""
    yield
    now = world.rows[edge]
    if now is None or now.mine is None or now.state == ENDED:
        return world.store_row(edge, now)
    _queue(world, edge, now, name)


def _queue(world: EdgeWorld, edge: str, now: Row, name: str) -> None:
    """Part of a step: a change goes into the row."""
    assert now.mine is not None
    after = now._replace(mine=now.mine.with_change(name))
    if now.state == PLAIN:
        after = after._replace(state=CHANGED, base=now.mine)
    world.acknowledged |= {name}
    world.store_row(edge, after)


def create(world: EdgeWorld, edge: str) -> Program:
    """A visitor's first request, at an edge that is cut off."""
    yield
    world.acknowledged |= {"made"}
    world.store_row(edge, Row(CREATED, Value(("made",))))


def read(world: EdgeWorld, edge: str, times: int = 2) -> Program:
    """A request that loads the session, and more of them afterwards."""
    for _ in range(times):
        yield
        row = world.row(edge)
        served = None if row is None else row.mine
        if row is None or row.state == PLAIN or "asks anyway" in world.broken:
            _, there = yield from led(world, edge)
            if isinstance(there, Lost):
                yield
                row = world.row(edge)
                served = None if row is None else row.mine
            else:
                yield
                now = world.rows[edge]
                ended = now is not None and now.state == ENDED
                served = None if there is None or ended else there.value
                if "asks anyway" in world.broken and there is not None:
                    served = there.value
                if there is not None:
                    _copied(world, edge, there.value)
                world.saw(served)
        world.serve(edge, served)


def _copied(world: EdgeWorld, edge: str, value: Value) -> None:
    """Part of a step: copy a record from the centre."""
    row = world.rows[edge]
    if row is None or row.state == PLAIN or "loads over" in world.broken:
        world.rows[edge] = Row(PLAIN, value)


def logout(world: EdgeWorld, edge: str) -> Program:
    yield
    row = world.row(edge)
    world.ending = True
    told = False
    if row is None or row.state == PLAIN:
        key, there = yield from led(world, edge)
        if not isinstance(there, Lost):
            gone = yield from asked(world, edge, lambda: world.remove(key))
            told = isinstance(gone, Record)
    yield
    world.ended |= {edge}
    world.store_row(edge, None if "no tombstone" in world.broken else Row(ENDED, told=told))


def logout_at_centre(world: EdgeWorld) -> Program:
    """By a request that goes to the centre itself."""
    yield
    there = world.load(KEY)
    if there is None:
        return
    if there.to is not None:
        yield
        world.remove(there.to)
    yield
    if world.remove(KEY) is not None or there.to is not None:
        world.ended |= {"centre"}


def rotate(world: EdgeWorld, pointer: bool = False) -> Program:
    """A sign-in or a rotation at the centre: store, turn the old key, enter the roster."""
    yield
    there = world.load(KEY)
    if there is None or there.to is not None:
        return
    yield
    world.create(NEXT, there.value, 9)
    yield
    if not world.turn(KEY, NEXT if pointer else None, there.version, 9):
        yield
        world.remove(NEXT)
        return
    world.untraced = world.untraced or not pointer
    yield
    if world.revoked:
        world.saw("revoked")
        yield
        world.remove(NEXT)
        return
    world.member = NEXT
    world.saw("entered")


def rotate_here(world: EdgeWorld, edge: str, pointer: bool, full: bool = False) -> Program:
    """A rotation at a node that reaches its centre. ``full``: its result can't be noted."""
    yield
    row = world.row(edge)
    if row is None or row.state != PLAIN:
        return
    there = yield from asked(world, edge, lambda: world.load(KEY))
    if not isinstance(there, Record) or there.to is not None:
        return
    copy = None
    if "keeps copy" not in world.broken:
        yield
        copy = world.rows[edge]
        if copy is not None and copy.state != PLAIN:
            return world.store_row(edge, copy)
        world.store_row(edge, None)

    def replace() -> bool:
        if world.store.get(KEY) != there:
            return world.saw(False)  # type: ignore[no-any-return]
        world.put(NEXT, there.value, 9)
        world.member = NEXT
        return world.turn(KEY, NEXT if pointer else None, there.version, 9)

    replaced = yield from asked(world, edge, replace)
    world.untraced = world.untraced or not pointer
    yield
    now = world.rows[edge]
    if replaced is not True:
        return world.store_row(edge, copy if now is None else now)
    if not pointer:
        world.rotated |= {edge}
    changed = now is not None and now.state != PLAIN and "rotates over" not in world.broken
    if not full and not changed:
        now = Row(PLAIN, there.value) if pointer else Row(ENDED, told=True)
    world.store_row(edge, now)


# -- settling


def end(world: EdgeWorld, edge: str) -> Call:
    """Tell the centre of an end; whether that is done."""
    key, there = yield from led(world, edge)
    if isinstance(there, Lost):
        return False
    gone = yield from asked(world, edge, lambda: world.remove(key))
    if isinstance(gone, Lost):
        return False
    if "key only" not in world.broken:

        def mark() -> str | None:
            if "revokes late" not in world.broken:
                world.revoked = True
            return world.saw(world.member)  # type: ignore[no-any-return]

        member = yield from asked(world, edge, mark)
        if isinstance(member, Lost):
            return False
        if member is not None and member != key:
            gone = yield from asked(world, edge, lambda: world.remove(member))
            if isinstance(gone, Lost):
                return False
    yield
    row = world.rows[edge]
    world.store_row(edge, row and row._replace(told=True))
    return True


def settle(world: EdgeWorld, edge: str) -> Call:
    """Until nothing is queued, or the edge is cut off."""
    for _ in range(4):
        yield
        row = world.row(edge)
        if row is None or row.state == PLAIN or (row.state == ENDED and row.told):
            return True
        if row.state == ENDED:
            done = yield from end(world, edge)
        elif row.state == CREATED:
            done = yield from _push(world, edge, row)
        else:
            done = yield from _settle(world, edge, row)
        if not done:
            return False
    return False


def _push(world: EdgeWorld, edge: str, row: Row) -> Call:
    there: Any = None
    made: Any = None
    mine, sent = row.mine, row.sent
    assert mine is not None
    if not row.pushed or "no pushed" in world.broken:
        yield
        now = world.rows[edge]
        if now is None or now.state != CREATED or (now.pushed and "no pushed" not in world.broken):
            world.store_row(edge, now)
            return True
        assert now.mine is not None
        sent = now.mine
        world.unsure = True
        world.store_row(edge, now._replace(pushed=True, sent=sent))
        value = sent

        def create() -> bool:
            world.late = world.given_up
            return world.create(KEY, value, 9) is not None

        made = yield from asked(world, edge, create)
        if isinstance(made, Lost):
            if not made.sent:
                yield
                now = world.rows[edge]
                if now is not None and now.state == CREATED:
                    now = now._replace(pushed=False, sent=None)
                world.store_row(edge, now)
            return False
    if made is True:
        there = Record(("", 0), sent, 9)
    else:
        _, there = yield from led(world, edge)
    if isinstance(there, Lost):
        return False
    yield
    now = world.rows[edge]
    if now is None or now.state != CREATED or now.sent != sent:
        world.store_row(edge, now)
        late = made is True and now is not None and now.state == ENDED
        if not late or "keeps late" in world.broken:
            world.late = False
            return True

        def remove() -> Record | None:
            world.late = False
            return world.remove(KEY)

        gone = yield from asked(world, edge, remove)
        return not isinstance(gone, Lost)
    if there is None:
        world.given_up = True
        told = "tells nobody" in world.broken
        world.store_row(edge, None if "forgets creation" in world.broken else Row(ENDED, told=told))
    elif now.mine == sent:
        world.store_row(edge, Row(PLAIN, there.value))
    else:
        world.store_row(edge, Row(CHANGED, now.mine, base=sent, number=now.number))
    return True


def _settle(world: EdgeWorld, edge: str, row: Row) -> Call:
    if row.sent is None or "no note" in world.broken:
        yield
        now = world.rows[edge]
        if now is None or now.state != CHANGED or (now.sent and "no note" not in world.broken):
            world.store_row(edge, now)
            return True
        world.numbers[edge] += 0 if now.sent else 1
        number = 1 if "numbers again" in world.broken else world.numbers[edge]
        row = now._replace(sent=now.mine, number=number)
        world.store_row(edge, row)
    sent, mark = row.sent, (edge, row.number)
    assert sent is not None
    for _ in range(3):
        key, there = yield from led(world, edge)
        if isinstance(there, Lost):
            return False
        if there is None:
            return (yield from _gone(world, edge, row))
        value = there.value
        applied = mark in value.marks
        if "by version" in world.broken:
            applied = sent.changes == value.changes
        if not applied:
            value = merged(row.base, value, sent)
            value = value._replace(marks=value.marks | {mark})
            if "drops base" in world.broken:
                value = sent._replace(marks=value.marks)
            expected = None if "blind save" in world.broken else there.version
            saved = yield from _saved(world, edge, key, value, expected)
            if isinstance(saved, Lost) and "forgets" not in world.broken:
                return False
            if not saved:
                continue
        yield
        now = world.rows[edge]
        if now is None or now.state != CHANGED or (now.sent, now.number) != (sent, row.number):
            world.store_row(edge, now)
        elif now.mine == sent or "overwrites" in world.broken:
            world.store_row(edge, Row(PLAIN, value))
        else:
            world.store_row(edge, now._replace(base=sent, sent=None))
        return True
    return False


def _gone(world: EdgeWorld, edge: str, row: Row) -> Call:
    """The session has ended at the centre: give its changes up."""
    if "recreates" in world.broken:
        yield
        assert row.mine is not None
        world.create(KEY, row.mine, 9)
    yield
    now = world.rows[edge]
    if now is not None and now.state == CHANGED:
        now = None
    world.store_row(edge, now)
    return True


def link(world: EdgeWorld, edge: str, *changes: bool) -> Program:
    """The link of an edge breaks (True) or comes back."""
    for is_cut in changes:
        yield
        world.cut = world.cut | {edge} if is_cut else world.cut - {edge}
        world.saw(is_cut)


# -- scenarios


def _with(function: Callable[..., Any], *arguments: Any) -> Callable[[Any], Program]:
    return lambda world: function(world, *arguments)


def scenarios(broken: Broken) -> Mapping[str, Scenario]:
    a, both = {"cut": "a"}, {"cut": "ab"}
    made = {"stored": False, "cut": "a"}
    write_a, settle_a = _with(write, "a", "x"), _with(settle, "a")
    back = _with(link, "a", False)
    breaks, again = _with(link, "a", True), _with(link, "a", False, True, False)

    def scenario(start: Mapping[str, Any], crashes: int = 1, **programs: Any) -> Scenario:
        return Scenario(start, crashes, programs)

    return {
        "write, cut": scenario({}, write=write_a, cut=_with(link, "a", True, False), s=settle_a),
        "read, write here": scenario(
            {}, read=_with(read, "a"), w=write_a, cut=_with(link, "a", True)
        ),
        "settle, write here": scenario(a, w=write_a, v=_with(write, "a", "y"), l=back, s=settle_a),
        "second cut": scenario(a, 0, w=write_a, l=again, s=settle_a, t=settle_a),
        "settle, write elsewhere": scenario(
            a, w=write_a, link=back, s=settle_a, b=_with(write, "b", "y")
        ),
        "two settlers": scenario(a, 0, w=write_a, link=back, s=settle_a, t=settle_a),
        "two edges": scenario(
            both,
            0,
            w=write_a,
            v=_with(write, "b", "y"),
            la=back,
            lb=_with(link, "b", False),
            s=settle_a,
            t=_with(settle, "b"),
        ),
        "cut, logout elsewhere": scenario(
            a, w=write_a, link=back, s=settle_a, out=_with(logout, "b")
        ),
        "cut, rotation": scenario(a, w=write_a, link=back, s=settle_a, r=_with(rotate, True)),
        "create, logout elsewhere": scenario(
            made, w=_with(create, "a"), link=again, s=settle_a, out=logout_at_centre
        ),
        "create, write": scenario(made, w=_with(create, "a"), v=write_a, link=back, s=settle_a),
        "create, two settlers": scenario(
            made, w=_with(create, "a"), link=back, s=settle_a, t=settle_a
        ),
        "rotation here, write": scenario(
            {},
            r=_with(rotate_here, "a", True),
            read=_with(read, "a", 1),
            w=_with(write_alone, "a", "x"),
        ),
        "rotation here, full disk": scenario(
            {},
            r=_with(rotate_here, "a", False, True),
            cut=_with(link, "a", True, False),
            s=settle_a,
        ),
        "logout here, read": scenario(
            {}, out=_with(logout, "a"), read=_with(read, "a"), cut=breaks
        ),
        "logout here, write": scenario(a, 0, out=_with(logout, "a"), w=write_a, l=back, s=settle_a),
        "logout here, rotation": scenario(
            a, out=_with(logout, "a"), link=back, r=rotate, s=settle_a
        ),
        "two logouts": scenario(
            both, out=_with(logout, "a"), w=_with(write, "b", "y"), lb=_with(link, "b", False)
        ),
    }


def start(broken: Broken, **how: Any) -> EdgeWorld:
    return EdgeWorld(broken, **how)


def check(world: EdgeWorld, broken: Broken) -> str:
    return ""


def final(world: EdgeWorld, broken: Broken) -> str:
    """All links are back, and somebody settles at both edges."""
    for edge in world.rotated:
        row = world.rows[edge]
        if row is not None and row.state == PLAIN:
            return "a token is served where it was rotated away"
    world.cut = frozenset()
    for edge in (*"ab", *"ab"):
        for _ in range(3):
            if world.alone(_with(settle, edge)):
                break
        else:
            return "an edge doesn't settle"
    there = world.reachable()
    if there is None and world.member == NEXT:  # a client has that token
        there = world.store.get(NEXT)
    if there is not None:
        changes = there.value.changes
        if world.ended:
            return "an ended session lives"
        if world.given_up and not world.late:
            return "a session that was given up lives"
        if world.given_up:
            world.facts["limits"] = ("a settler was stopped, created a session late, and died",)
        if len(set(changes)) < len(changes):
            return "a change counts twice"
        if not world.acknowledged <= set(changes) and not world.untraced:
            return "an acknowledged change is lost"
    elif not world.ending and not world.ended and not world.untraced and world.acknowledged:
        if not world.unsure:
            return "a session is lost"
        world.facts["limits"] = ("a creation that was perhaps never sent is given up",)
    return ""


MODEL = Model(BREAKS, scenarios, start, check, final)


def run(name: str, broken: Broken = NOTHING, crashes: int | None = None) -> Explored:
    return MODEL.explore(name, broken, crashes=crashes)
