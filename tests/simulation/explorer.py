"""Explores every interleaving of a few small programs that share one store, with crashes.

A protocol is modelled by generators. A program yields before each verb of the store, so a step is
one verb on one key plus everything the program concludes from the answer, and other programs may
run between two steps. A crash ends a program before any of its steps, also before its answer is
sent.

A program knows only what its verbs answered. So two schedules that lead to the same store and the
same answers are the same state, and each state is examined once. Shorter schedules come first, so
the schedule reported for a fault is a shortest one; ``a!`` in it is a crash of ``a``.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Generator, Hashable, Iterable, Mapping
from typing import Any, NamedTuple

Program = Generator[None, None, Any]
Broken = frozenset[str]

NOTHING: Broken = frozenset()
MAX_POINTERS = 4


class Record(NamedTuple):
    """The value under a key; a pointer if it has ``to``. It is gone from the time ``ends`` on."""

    version: tuple[str, int]
    value: Any
    ends: float
    to: str | None = None


class World:
    """The store, the time, and ``facts``, the knowledge of the outside world. All are hashable."""

    def __init__(self, **facts: Any) -> None:
        self.store: dict[str, Record] = {}
        self.facts = facts
        self.time: float = 0
        self.fault = ""
        self._running = ""
        self._answers: dict[str, tuple[Any, ...]] = {}
        self._verbs = 0

    # Verbs: one in each step.

    def load(self, key: str) -> Record | None:
        return self.saw(self.store.get(key))  # type: ignore[no-any-return]

    def create(self, key: str, value: Any, ends: float, to: str | None = None) -> Record | None:
        """The new record; None if the key is taken."""
        new = None if key in self.store else self.put(key, value, ends, to)
        return self.saw(new)  # type: ignore[no-any-return]

    def save(self, key: str, value: Any, expected: Any, ends: float = 0) -> Record | None:
        """The new record; None if the stored one is stale or gone.

        ``expected`` None accepts any version.
        """
        there = self._there(key, expected)
        new = there and self.put(key, value, max(ends, there.ends))
        return self.saw(new)  # type: ignore[no-any-return]

    def turn(self, key: str, to: str | None, expected: Any, ends: float = 0) -> bool:
        """The deciding step of a rotation: the old key points to the new one, or becomes free."""
        there = self._there(key, expected)
        if there and to:
            self.put(key, None, ends, to)
        elif there:
            del self.store[key]
        return self.saw(there is not None)  # type: ignore[no-any-return]

    def remove(self, key: str) -> Record | None:
        """Remove one key, with a record or a pointer. Returns its old value."""
        return self.saw(self.store.pop(key, None))  # type: ignore[no-any-return]

    def put(self, key: str, value: Any, ends: float, to: str | None = None) -> Record:
        """No verb, but a part of one."""
        version = self._running, len(self._answers.get(self._running, ()))
        self.store[key] = Record(version, value, ends, to)
        return self.store[key]

    def _there(self, key: str, expected: Any) -> Record | None:
        there = self.store.get(key)
        fits = there and not there.to and expected in (None, there.version)
        return there if fits else None

    def saw(self, answer: Any) -> Any:
        """The result of this step for the running program."""
        self._verbs += 1
        assert self._verbs == 1, "two verbs in one step"
        self._answers[self._running] = (*self._answers.get(self._running, ()), answer)
        return answer

    # The run.

    def tick(self, time: float) -> None:
        """It is ``time`` now; records that end by then are gone."""
        self.time = time
        for key in [key for key, record in self.store.items() if record.ends <= time]:
            del self.store[key]

    def step(self, name: str, program: Program) -> bool:
        """One step of a program; False if it was the last one."""
        self._running, self._verbs = name, 0
        return next(program, StopIteration) is None

    def alone(self, program: Callable[[Any], Program], name: str = "probe") -> Any:
        """The return value of a program that runs from here to its end with nothing beside it."""
        running = program(self)
        while True:
            self._running, self._verbs = name, 0
            try:
                next(running)
            except StopIteration as end:
                self._answers.pop(name, None)
                return end.value

    def copy(self) -> Any:
        other = type(self)(**self.facts)
        other.store, other.time = dict(self.store), self.time
        return other

    def state(self) -> Hashable:
        facts = tuple(self.facts.items())
        return frozenset(self.store.items()), facts, self.time, frozenset(self._answers.items())


class Explored(NamedTuple):
    """The result of an exploration.

    ``faults``: for each kind of fault the shortest schedule that leads to it. ``limits``: in how
    many endings each documented limit shows.
    """

    states: int
    endings: int
    faults: dict[str, str]
    limits: Mapping[str, int]


def explore(
    make: Callable[[], tuple[Any, dict[str, Program]]],
    check: Callable[[Any], str],
    final: Callable[[Any], str],
    *,
    crashes: int = 1,
    unbreakable: tuple[str, ...] = ("clock",),
    first: bool = False,
) -> tuple[int, int, dict[str, str]]:
    """The numbers of states and endings, and the faults as in ``Explored``.

    ``check`` judges every state, ``final`` those in which no program runs any more. ``first``:
    stop at the first fault.
    """
    seen: set[Hashable] = set()
    schedules: deque[tuple[str, ...]] = deque([()])
    endings = 0
    faults: dict[str, str] = {}
    while schedules and not (first and faults):
        schedule = schedules.popleft()
        world, programs = make()
        for name, program in programs.items():
            world.step(name, program)
        crashed = 0
        for name in schedule:
            if name[-1] == "!":
                crashed += 1
                del programs[name[:-1]]
            elif not world.step(name, programs[name]):
                del programs[name]
        state = world.state(), frozenset(programs)
        if state in seen:
            continue
        seen.add(state)
        fault = world.fault or check(world)
        if not fault and not programs:
            endings += 1
            fault = final(world)
        if fault:
            faults.setdefault(fault, " ".join(schedule))
            continue
        for name in programs:
            schedules.append((*schedule, name))
            if crashed < crashes and name not in unbreakable:
                schedules.append((*schedule, name + "!"))
    return len(seen), endings, faults


def follow(world: World, key: str) -> Generator[None, None, tuple[str | None, Record | None]]:
    """The key and the record of the session under ``key`` now, through pointers."""
    for _ in range(MAX_POINTERS):
        yield
        there = world.load(key)
        if there is None or there.to is None:
            return (key, there) if there else (None, None)
        key = there.to
    return None, None


def clock(world: World, *times: float) -> Program:
    """A program that moves the time."""
    for moment in times:
        yield
        world.tick(moment)
        world.saw(None)


class Scenario(NamedTuple):
    """How the world starts, how many programs may crash, and the programs by name."""

    start: Mapping[str, Any]
    crashes: int
    programs: Mapping[str, Callable[[Any], Program]]


class Break(NamedTuple):
    """A deliberate mistake: its meaning, and the scenario that shows it."""

    meaning: str
    scenario: str


class Model:
    """A protocol with its scenarios and its deliberate breaks.

    ``scenarios(broken)``: the scenarios by name, with these breaks in force. ``start(broken,
    **scenario.start)`` makes the world. ``check`` and ``final`` take a world and the breaks and
    return a fault, or "".
    """

    def __init__(
        self,
        breaks: Mapping[str, Break],
        scenarios: Callable[[Broken], Mapping[str, Scenario]],
        start: Callable[..., Any],
        check: Callable[[Any, Broken], str],
        final: Callable[[Any, Broken], str],
    ) -> None:
        self.breaks, self.scenarios = breaks, scenarios
        self._start, self._check, self._final = start, check, final

    def names(self) -> Iterable[str]:
        return list(self.scenarios(NOTHING))

    def explore(
        self, name: str, broken: Broken = NOTHING, *, crashes: int | None = None
    ) -> Explored:
        """Explore one scenario; with breaks in force, up to the first fault.

        ``crashes``: instead of the scenario's number of programs that may crash.
        """
        scenario = self.scenarios(broken)[name]
        limits: Counter[str] = Counter()

        def make() -> tuple[Any, dict[str, Program]]:
            world = self._start(broken, **scenario.start)
            return world, {me: program(world) for me, program in scenario.programs.items()}

        def final(world: Any) -> str:
            fault = self._final(world, broken)
            limits.update(world.facts.get("limits", ()))
            return fault

        def check(world: Any) -> str:
            return self._check(world, broken)

        most = scenario.crashes if crashes is None else crashes
        explored = explore(make, check, final, crashes=most, first=bool(broken))
        return Explored(*explored, limits)
