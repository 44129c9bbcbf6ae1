"""Model: first requests with a Flask cookie that several visitors may have, in every interleaving.

The old cookie holds the values itself, so there is no old record. Each step is one atomic verb on
one key. A request with our cookie looks at nothing else. A request with only the old one

1. loads the mark. It says that the cookie is dead: serves nothing;
2. no mark: creates a session, then the mark that names it. If the mark exists by then: deletes its
   session, and goes on with the mark that it loads;
3. a mark: loads the session that it names. None: the cookie is dead. Otherwise creates a copy;
4. before it stores a change: stores the next version of the mark, with the time, whichever version
   is there. The cookie is dead by now: answers without ours;
5. without a change: stores the next version over the one of step 1 or 2. Another version is there,
   or that one is younger than an answer can be on its way: answers without our cookie;
6. stores its changes, and answers with the token.

A logout stores in the mark that the cookie is dead, then deletes the session, then answers.

Invariants

- apart: no session is served to two visitors, and a logout ends no other visitor's;
- kept: an answer to a read replaces no cookie of a session that was answered, or whose change was
  past step 4, before the read came to step 5. So the browser keeps its changes and its login;
- ended: after an acknowledged logout, no request that begins with the old cookie is served, and a
  request that runs beside it sets a cookie only if it was past step 4 or 5;
- a way in: after crashes and lost answers, a later read gets our cookie, while the old one lives;
- an end: nothing is stored for ever.

Limit that stays: a late answer. A request was past step 4 or 5 when another one, or a logout, came
to it, and its answer arrives last. Of two writes the later answer wins, as with Flask's cookies.

Not covered: answers that are on their way for more than ten seconds, clocks that differ by more.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping

from .explorer import Break, Broken, Model, Program, Record, Scenario, World

MARK_END, OWN_END, ON_ITS_WAY = 90, 99, 10
Look = tuple[str | None, Record | None, Record | None]
NOTHING: Look = None, None, None

BREAKS = {
    name: Break(meaning, scenario)
    for name, (meaning, scenario) in {
        "shared": ("a later request gets the session that the mark names", "two visitors"),
        "no mark": ("nothing remembers the first request", "reads, logout"),
        "no note": ("a write stores nothing in the mark", "slow read, write"),
        "note once": (
            "a write that loses the race for the mark goes on",
            "slow write, read, time",
        ),
        "only look": ("a read looks at the mark, and stores nothing", "slow read, visit"),
        "no wait": ("a read doesn't wait for answers on their way", "slow read, visit"),
        "no end": ("a logout stores nothing in the mark", "reads, logout"),
        "first ends": ("it ends the named session instead", "two visitors, logout"),
        "end last": ("it answers before it stores that", "reads, logout"),
        "deaf write": ("a write doesn't see that the cookie is dead", "write, logout"),
        "endless mark": ("the mark has no end", "slow read, write"),
    }.items()
}


def look(w: Site, me: str, broken: Broken) -> Generator[None, None, Look]:
    """Steps 1 to 3: the session's key and record, and the mark as it was found."""
    yield
    mark = w.load("mark")
    if mark is None:
        key = f"R{me}"
        yield
        made = w.create(key, frozenset(), OWN_END)
        if "no mark" in broken:
            return key, made, None
        yield
        end = 999 if "endless mark" in broken else MARK_END
        mark = w.create("mark", (key, False, None), end)
        if mark is not None:
            return key, made, mark
        yield
        w.remove(key)
        yield
        mark = w.load("mark")
    if mark is None or mark.value[1]:
        return NOTHING
    first = mark.value[0]
    yield
    there = w.load(first)
    if there is None:
        return NOTHING
    if "shared" in broken:
        return first, there, mark
    yield
    return f"C{me}", w.create(f"C{me}", frozenset(), OWN_END), mark


def note(
    w: Site, mark: Record | None, broken: Broken, *, ends: bool = False
) -> Generator[None, None, bool]:
    """Step 4, or a logout's: store the mark's next version; False if the cookie is dead."""
    while True:
        if mark is None:
            yield
            mark = w.load("mark")
        if mark is None or (mark.value[1] and "deaf write" not in broken):
            return mark is None
        yield
        if w.save("mark", (mark.value[0], ends or mark.value[1], w.time), mark.version):
            return True
        if "note once" in broken:
            return True
        mark = None


def claim(w: Site, mark: Record, began: float, broken: Broken) -> Generator[None, None, bool]:
    """Step 5: whether a request that only read may answer with a cookie."""
    first, _, answered = mark.value
    if answered is not None and began < answered + ON_ITS_WAY and "no wait" not in broken:
        return False
    yield
    if "only look" in broken:
        there = w.load("mark")
        return there is not None and there.version == mark.version
    return w.save("mark", (first, False, w.time), mark.version) is not None


def request(
    w: Site, me: str, broken: Broken, does: str, visitor: str = "a"
) -> Generator[None, None, bool]:
    """One request; returns whether it was served."""
    yield
    (token, has_old), began, ended = w.saw((w.facts[visitor], w.time, w.facts["ended"]))
    key: str | None = token
    mark = None
    if token:
        yield
        record = w.load(token)
    elif has_old:
        key, record, mark = yield from look(w, me, broken)
    else:
        return False
    if key is None or record is None:
        return False
    if ended and not token:
        w.fault = "served after the end"
    w.serve(key, visitor)
    if does == "logout":
        yield from logout(w, key, visitor, broken)
        return True
    answers = not token
    if mark is not None and does == "read":
        answers = yield from claim(w, mark, began, broken)
    elif mark is not None and "no note" not in broken:
        answers = yield from note(w, mark, broken)
    w.passes(me, key, answers=answers, changes=does != "read")
    if does == "write":
        while record is not None:
            yield
            if w.save(key, record.value | {me}, record.version):
                break
            yield
            record = w.load(key)
    elif does == "sign in":
        yield
        w.create(f"N{me}", record.value, OWN_END)
        yield
        if w.turn(key, None, record.version):
            key, answers = f"N{me}", True
            w.passes(me, key, answers=True, changes=True)
    if answers:
        yield
        w.answer(me, key, visitor)
    return True


def logout(w: Site, key: str, visitor: str, broken: Broken) -> Program:
    for part in ("session", "mark") if "end last" in broken else ("mark", "session"):
        if part == "session":
            yield
            w.remove(key)
            if "end last" in broken:
                w.facts["ended"] = True
        elif "first ends" in broken:
            yield
            mark = w.load("mark")
            yield
            w.remove(mark.value[0] if mark else "")
        elif "no end" not in broken:
            yield from note(w, None, broken, ends=True)
        if part == "mark":
            w.facts["past_at_end"] = w.facts["past"]
    yield
    w.saw("answered")
    w.facts["ended"] = True
    w.facts[visitor] = (None, False)


def visits(w: Site, me: str, broken: Broken, *does: str) -> Program:
    """Several requests of one browser, one after the other."""
    for number, each in enumerate(does):
        yield from request(w, f"{me}{number}", broken, each)


def another_visitor(w: Site) -> Program:
    """Is answered, and time passes, unless an answer is on its way."""
    yield
    mark = w.store["mark"]
    w.save("mark", (mark.value[0], mark.value[1], w.time), mark.version)
    yield
    if not w.saw(w.facts["on_its_way"]):
        w.tick(w.time + ON_ITS_WAY)


class Site(World):
    def serve(self, key: str, visitor: str) -> None:
        self.facts["served"] |= {(key, visitor)}
        if len({who for at, who in self.facts["served"] if at == key}) > 1:
            self.fault = "two visitors in one session"

    def passes(self, me: str, key: str, *, answers: bool, changes: bool) -> None:
        """The request is past step 4 or 5. A read must not replace the ``kept`` sessions now."""
        if not answers:
            return
        self.facts["past"] |= {me}
        self.facts["on_its_way"] |= {me}
        if changes:
            self.facts["kept"] |= {key}
        else:
            self.facts["must_not"] |= {(me, kept) for kept in self.facts["kept"]}

    def answer(self, me: str, key: str, visitor: str) -> None:
        self.saw("answered")
        token, has_old = self.facts[visitor]
        if (me, token) in self.facts["must_not"] and token != key:
            self.fault = "a read replaces the cookie of another answer"
        if not has_old and me not in self.facts["past_at_end"]:
            self.fault = "a cookie is set after a logout"
        if not has_old or (token and token != key):
            self.facts["limits"] |= {"late answer"}
        self.facts["on_its_way"] -= {me}
        self.facts["kept"] |= {key}
        self.facts[visitor] = (key, has_old)


def start(broken: Broken, visited: bool = False) -> Site:
    none: frozenset[str] = frozenset()
    sets = dict.fromkeys(
        ("served", "past", "past_at_end", "on_its_way", "kept", "must_not", "limits"), none
    )
    w = Site(a=(None, True), b=(None, True), c=(None, True), ended=False, **sets)
    if visited:  # by another visitor, and long ago
        w.alone(lambda w: request(w, "z", broken, "read", "c"), "z")
        w.facts["on_its_way"] = none
        w.time = ON_ITS_WAY
    return w


def check(w: Site, broken: Broken) -> str:
    """The invariants of every state."""
    mark = w.store.get("mark")
    if mark and mark.ends > MARK_END:
        return "without an end"
    later = w.copy()
    later.facts["p"] = (None, True)
    if w.facts["ended"] and later.alone(lambda w: request(w, "probe", broken, "read", "p")):
        return "served after the end"
    others = {w.facts[visitor][0] for visitor in "bc"} - {None}
    return "" if others <= w.store.keys() else "another visitor is logged out"


def final(w: Site, broken: Broken) -> str:
    """The invariants once no program runs any more."""
    mark = w.store.get("mark")
    if mark is None or mark.value[1] or mark.value[0] not in w.store:
        return ""
    later = w.copy()
    later.time += ON_ITS_WAY
    later.facts["p"] = (None, True)
    later.alone(lambda w: request(w, "probe", broken, "read", "p"))
    return "" if later.facts["p"][0] in later.store else "no way in"


def scenarios(broken: Broken) -> Mapping[str, Scenario]:
    def at(me: str, does: str, visitor: str = "a") -> Callable[[Site], Program]:
        return lambda w: request(w, me, broken, does, visitor)

    def visit(*does: str) -> Callable[[Site], Program]:
        return lambda w: visits(w, "v", broken, *does)

    read, write = at("r", "read"), at("w", "write")
    out, stranger = at("out", "logout"), at("s", "write", "b")
    earlier = {"visited": True}
    return {
        name: Scenario(begin, crashes, programs)
        for name, (begin, crashes, programs) in {
            "slow read, write": ({}, 1, {"r": read, "w": write}),
            "slow read, visit": ({}, 1, {"r": read, "v": visit("read", "write")}),
            "slow read, visit, later": (earlier, 0, {"r": read, "v": visit("read", "sign in")}),
            "slow write, read, time": (
                earlier,
                0,
                {"w": write, "r": read, "clock": another_visitor},
            ),
            "reads, logout": ({}, 1, {"r": read, "out": out}),
            "write, logout": (earlier, 1, {"w": write, "out": out}),
            "two logouts, read": (
                earlier,
                0,
                {"r": read, "out": out, "also": at("also", "logout")},
            ),
            "two visitors": ({}, 1, {"w": write, "s": stranger}),
            "two visitors, logout": (earlier, 1, {"out": out, "r": at("s", "read", "b")}),
        }.items()
    }


MODEL = Model(BREAKS, scenarios, start, check, final)
