"""Model: the near cache never serves records older than its bound, in every interleaving.

One record at two servers, ``P`` and ``Q``; a process that keeps it near, with a listener for each
server it hears; other processes that write it. Time moves by one tick, which is the bound.

A server works in rounds, as Redis does. It polls; then it reads what has come from the listener by
the time it gets there, if anything had come when it polled, and answers all of that at once; writes
happen before, between and after; at the end of the round it reports them. So the answer to a beat
may leave before the report of a write that happened before it. A write counts as acknowledged at
once, which is earlier than Redis does it: the protocol doesn't rely on when answers leave.

The protocol, as in ``stores/wrappers/near_cache.py`` and ``live/listener.py``

1. a beat is sent while fewer than two are unanswered. When one is answered, the feed is exact as of
   the moment the answered one before it was sent;
2. a load leaves a mark, looks the feed up, asks the server, and keeps the record under that feed if
   the mark is still there. A report, a flush, a cut, a move and an own write remove the mark and
   what is kept;
3. a read takes the kept record, then the moment as of which its feed is exact, then makes sure that
   the record is still kept, and only then looks at the clock: it serves the record if less than the
   bound went by since that moment;
4. a cut removes the feed. The next connection begins with a new one, which has proven nothing;
5. before a record is read from another server than before, the process drops what it keeps, with
   the marks; if the old server was replaced, the process gives up its feed as well. Over gRPC it
   does so, too, before it uses a record that came from another server than its stream of changes:
   that server may not have noticed a failover yet (``stores/remote/changes.py``).

Invariants

- fresh: when a record is served, no other was acknowledged the bound ago or earlier;
- own: a process never serves a record older than one it wrote itself.

A primary that was replaced and doesn't know it serves old records until this process learns of it,
as it would without the cache.

A crash of this process also ends its cache, so the model has no crashes.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import Any, NamedTuple

from .explorer import NOTHING, Break, Broken, Explored, Model, Program, Scenario, World, clock

BOUND = 1
MARK = 1
NONE_YET = -9  # a moment

BREAKS = {
    name: Break(meaning, scenario)
    for name, (meaning, scenario) in {
        "no bound": ("a kept record is served however long nothing was proven", "write"),
        "no mark": ("a record is kept although it changed during its load", "load, write"),
        "one beat": ("exact as of the last answered beat, not the last but one", "write"),
        "three beats": ("three beats may be unanswered", "write"),
        "looked once": ("3 without making sure that it is still kept", "write"),
        "clock first": ("3 looks at the clock before anything else", "write"),
        "cut": ("what was kept before a cut is proven by beats that come after it", "cut"),
        "flush: kept": ("a flush removes nothing", "flush"),
        "own: kept": ("an own write removes nothing", "own write"),
        "own: mark": ("an own write leaves the mark", "load, own write"),
        "move: kept": ("5 without dropping anything", "slot moves"),
        "move: mark": ("5 leaves the mark", "slot moves"),
        "feed first": ("2 looks the feed up before the mark", "slot moves"),
        "elsewhere": ("5 uses the record of a server that isn't heard", "two servers"),
        "replaced": ("5 goes on with the feed of the replaced server", "failover"),
    }.items()
}


Programs = Mapping[str, Callable[..., Program]]


class Kept(NamedTuple):
    version: int
    feed: int


class NearWorld(World):
    """The servers, the messages on their way, and the process with its cache."""

    def __init__(
        self,
        broken: Broken = NOTHING,
        *,
        kept: bool = True,
        many: bool = False,
        reads_from: str = "P",
    ) -> None:
        super().__init__()
        self.broken = broken
        # The servers.
        self.many = many  # a cluster, where each server has a feed
        self.primary = "P"
        self.version = {"P": 1, "Q": 1}
        self.changed: dict[str, tuple[str, ...]] = {"P": (), "Q": ()}  # in this round
        self.tracks = {"P": True, "Q": True}
        self.inbox: dict[str, tuple[str, ...]] = {"P": (), "Q": ()}
        self.outbox: dict[str, tuple[str, ...]] = {"P": (), "Q": ()}
        self.acknowledged: dict[int, float] = {}
        # The process.
        self.reads_from = reads_from
        self.feeds: dict[str, int] = {"P": 1, "Q": 2}
        self.hears: dict[str, int] = {"P": 1, "Q": 2}  # connections: they may outlive their feed
        self.exact_as_of: dict[int, float] = {1: 0, 2: 0}
        self.sent: dict[str, tuple[float, ...]] = {"P": (), "Q": ()}
        self.answered: dict[str, float] = {"P": 0, "Q": 0}
        self.kept = Kept(1, 1) if kept else None
        self.mark: int | None = None
        self.own = 0  # the version of the last write of its own that it knows of
        self.over = False  # the read, and with it the interesting part

    def at(self, *place: Any) -> None:
        """The position of the running program, and the knowledge it still needs."""
        self._answers[self._running] = place

    def step(self, name: str, program: Program) -> bool:
        return not self.over and super().step(name, program)

    def state(self) -> Hashable:
        if self.over:
            return self.fault
        parts = (
            *(self.version, self.changed, self.tracks, self.inbox, self.outbox, self.acknowledged),
            *(self.feeds, self.hears, self.exact_as_of, self.sent, self.answered),
        )
        process = self.primary, self.reads_from, self.kept, self.mark, self.own, self.time
        return (*(tuple(part.items()) for part in parts), process, frozenset(self._answers.items()))

    # The servers.

    def write(self, server: str, *, flush: bool = False) -> int:
        """Another version; it is reported at the end of the round."""
        self.version[server] = version = max(self.version.values()) + 1
        self.changed[server] += ("flush" if flush else "changed",)
        self.acknowledged[version] = self.time
        return version

    def end_round(self, server: str) -> None:
        if self.tracks[server]:
            self.outbox[server] += self.changed[server]
        self.changed[server] = ()

    def answer_all(self, server: str) -> None:
        for request in self.inbox[server]:
            self.tracks[server] = True
            self.outbox[server] += (request,)
        self.inbox[server] = ()

    # The process.

    def feed(self) -> int | None:
        """The feed for the record: of the node that has it, or of the one primary."""
        return self.feeds.get(self.reads_from if self.many else "P")

    def learn(self) -> None:
        """Before it reads from Q."""
        self.reads_from = "Q"
        if "move: kept" not in self.broken:
            self.drop(mark="move: mark" not in self.broken)

    def drop(self, *, mark: bool = True) -> None:
        self.kept = None
        if mark:
            self.mark = None

    def hear(self, server: str) -> None:
        """The listener handles one message, and sends a beat where it may."""
        if self.outbox[server]:
            message, *rest = self.outbox[server]
            self.outbox[server] = tuple(rest)
            if message == "track":
                self._opened(server)
            elif message == "beat":
                self._answered(server)
            elif message == "changed" or "flush: kept" not in self.broken:
                self.drop()
        most = 3 if "three beats" in self.broken else 2
        if server in self.hears and len(self.sent[server]) < most:
            self.sent[server] += (self.time,)
            self.inbox[server] += ("beat",)

    def _opened(self, server: str) -> None:
        feed = 1 if "cut" in self.broken else 3
        self.feeds[server] = self.hears[server] = feed
        self.exact_as_of.setdefault(feed, NONE_YET)
        self.answered[server] = NONE_YET

    def _answered(self, server: str) -> None:
        sent, *rest = self.sent[server]
        self.sent[server] = tuple(rest)
        last = "one beat" in self.broken
        exact = sent if last else self.answered[server]
        self.answered[server] = sent
        feed = self.hears[server]
        if self.feeds.get(server) == feed:
            self.exact_as_of[feed] = max(exact, self.exact_as_of[feed])

    def serve(self, version: int, own: int) -> None:
        if self.reads_from != self.primary:
            return  # without the cache it would read there, too
        for other, moment in self.acknowledged.items():
            if other > version and self.time - moment >= BOUND:
                self.fault = "a record older than the bound is served"
        if version < own:
            self.fault = "a process doesn't see its own write"


def server(world: NearWorld, name: str) -> Program:
    while True:
        yield
        world.end_round(name)
        readable = bool(world.inbox[name])
        world.at("polled", readable)
        yield
        if readable:
            world.answer_all(name)
        world.at("read")


def answering(world: NearWorld, name: str) -> Program:
    while True:
        yield
        world.answer_all(name)
        world.at("answered")


def listener(world: NearWorld, name: str) -> Program:
    while True:
        yield
        world.hear(name)
        world.at("heard")


def writer(world: NearWorld, name: str = "P", *, flush: bool = False) -> Program:
    yield
    while world.primary != name:
        yield
    world.write(name, flush=flush)
    world.at("written")


def own_writer(world: NearWorld) -> Program:
    yield
    version = world.write("P")
    world.at("written", version)
    yield
    world.own = version
    if "own: kept" not in world.broken:
        world.drop(mark="own: mark" not in world.broken)
    world.at("returned")


def load(world: NearWorld) -> Program:
    feed: int | None = None
    if "feed first" in world.broken:
        yield
        feed = world.feed()
        world.at("feed", feed)
    yield
    mark = world.mark = MARK
    world.at("marked", feed)
    if "feed first" not in world.broken:
        yield
        feed = world.feed()
        world.at("fed", feed)
    yield
    if world.reads_from != world.primary and world.many:
        world.learn()  # P says that the record is at Q
    version = world.version[world.reads_from]
    world.at("loaded", feed, version)
    yield
    intact = world.mark == mark or "no mark" in world.broken
    if intact and feed is not None:
        world.kept = Kept(version, feed)
    world.mark = None
    world.at("kept")


def load_elsewhere(world: NearWorld) -> Program:
    """By a gRPC server that still reads from Q, while the stream comes from one that hears P."""
    yield
    mark, feed = MARK, world.feed()
    world.mark = mark
    world.at("marked", feed)
    yield
    version = world.version["Q"]
    world.at("loaded", feed, version)
    yield
    if "elsewhere" not in world.broken:
        world.feeds.clear()
        world.drop()
    elif world.mark == mark and feed is not None:
        world.kept = Kept(version, feed)
    world.mark = None
    world.at("kept")


def stranger_learns(world: NearWorld) -> Program:
    """The other gRPC server learns that P is the primary: all loads are current from now on."""
    yield
    world.reads_from = "P"
    world.at("learned")


def reader_elsewhere(world: NearWorld) -> Program:
    yield from load_elsewhere(world)
    yield from peek(world)


def peek(world: NearWorld) -> Program:
    yield
    kept, own, early = world.kept, world.own, world.time
    world.at("found", kept, own, early if "clock first" in world.broken else None)
    if kept is not None:
        yield
        exact = world.exact_as_of[kept.feed]
        world.at("exact", kept, own, exact, early if "clock first" in world.broken else None)
        yield
        if "looked once" in world.broken or world.kept is kept:
            now = early if "clock first" in world.broken else world.time
            world.at("sure", kept, own)
            if now - exact < BOUND or "no bound" in world.broken:
                world.serve(kept.version, own)
    world.over = True


def reader(world: NearWorld) -> Program:
    yield from load(world)
    yield from peek(world)


def cut(world: NearWorld) -> Program:
    """The connection to P breaks, and another one begins."""
    yield
    world.outbox["P"] = world.inbox["P"] = ()
    world.sent["P"] = ()
    world.tracks["P"] = False
    del world.hears["P"]
    world.feeds.pop("P")
    if "cut" not in world.broken:
        world.drop()
    world.at("cut")
    yield
    world.inbox["P"] = ("track",)
    world.at("asked")


def slot_moves(world: NearWorld) -> Program:
    """Q serves the record from now on, and P sends whoever asks there."""
    yield
    world.primary = "Q"
    world.outbox["P"] += ("changed",)
    world.at("moved")
    yield
    world.learn()  # by another load
    world.at("learned")


def failover(world: NearWorld) -> Program:
    """Q serves the record from now on; later, a connection of this process leads there."""
    yield
    world.primary = "Q"
    world.at("replaced")
    yield
    if "replaced" not in world.broken:
        world.feeds.clear()  # Q is heard later
    world.learn()
    world.at("learned")


def _with(function: Callable[..., Program], *arguments: Any, **more: Any) -> Callable[..., Program]:
    return lambda world: function(world, *arguments, **more)


def _ticks(world: NearWorld) -> Program:
    return clock(world, 1)


def scenarios(broken: Broken) -> Mapping[str, Scenario]:
    start: dict[str, Any] = {}
    empty: dict[str, Any] = {"kept": False}
    p: Programs = {"p": _with(server, "P"), "ear": _with(listener, "P")}
    # Nobody listens to Q yet, and nothing is written at P: they need no rounds.
    q: Programs = {**p, "p": _with(answering, "P"), "writer": _with(writer, "Q")}

    def scenario(start: Mapping[str, Any], programs: Programs, **more: Any) -> Scenario:
        return Scenario(start, 0, {"clock": _ticks, **programs, **more})

    return {
        "write": scenario(start, p, writer=writer, reader=peek),
        "load, write": scenario(empty, p, writer=writer, reader=reader),
        "cut": scenario(start, p, cut=cut, writer=writer, reader=peek),
        "flush": scenario(start, p, writer=_with(writer, flush=True), reader=peek),
        "own write": Scenario(start, 0, {**p, "own": own_writer, "reader": peek}),
        "load, own write": Scenario(empty, 0, {**p, "own": own_writer, "reader": reader}),
        "slot moves": scenario({**empty, "many": True}, q, move=slot_moves, reader=reader),
        "two servers": scenario(
            {**empty, "reads_from": "Q"},
            p,
            writer=writer,
            learns=stranger_learns,
            reader=reader_elsewhere,
        ),
        "failover": scenario(empty, q, move=failover, reader=reader),
    }


def start(broken: Broken, **how: Any) -> NearWorld:
    return NearWorld(broken, **how)


def check(world: NearWorld, broken: Broken) -> str:
    return ""


MODEL = Model(BREAKS, scenarios, start, check, check)


def run(name: str, broken: Broken = NOTHING) -> Explored:
    return MODEL.explore(name, broken)
