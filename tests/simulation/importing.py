"""Model: an old session is taken over exactly once, in every interleaving, with a crash anywhere.

The old session is a Flask-Session record, named by an old cookie. New workers run Flask-GSession;
old workers are the application as it was before. The new cookie has another name than the old one,
and a browser keeps both until a logout.

The protocol. A request with a new cookie looks at nothing else. A request with only an old cookie

1. loads the old record, then the mark: a record of its own under a digest of the old id, which
   names the session and holds a random nonce. In this order: a logout deletes the old record only
   while the mark is there, so finding neither proves that there is no session;
2. if there is an old record and no mark: creates the session under a fresh key. Its token is an
   HMAC, under the secret key, of the old id and the nonce: anyone who has the old cookie can be
   given the same token again, and reading the store is not enough to make it;
3. creates the mark, which outlives ``SESSION_IMPORT_UNTIL`` by as long as a request may take. If
   the mark exists already: deletes its own session, loads the winner's mark, and uses that;
4. unless it created the session itself: loads the one the mark names, through pointers. If there
   is none, the session ended, and the old cookie is dead for good. The mark is no pointer, so no
   delete removes it;
5. if the session names a user: enters it in the roster, unless it is there, with the epoch that a
   roster begins with. If that is refused: deletes the old record and the session. A roster whose
   epoch has changed is kept as long as a mark;
6. works, saves, and answers with the token, unless a pointer led to the session.

A logout deletes the old record, then the session, then the roster's entry, then answers. Revoking
all sessions changes the epoch and marks the entries as ending, then does the same for each.

Watching (an option while old workers serve): before step 6, and in each request with the token of
an imported session, it looks at the old record. If that is gone before its time, an old worker
logged the user out, and the session is ended.

Invariants

- one session: all first requests are served the same session;
- ended: after an acknowledged logout, revocation or expiry, no request that begins is served by a
  new worker, whichever cookies it has;
- signed in: the old cookie never leads to a session that signed in after the import;
- writes: what a new worker saved is there until the session ends;
- a way in: after a crash and lost answers the browser gets in, also after the graces, as long as
  nobody asked for an end;
- old record: after an acknowledged logout it is gone, unless an old worker that had loaded it
  before wrote it back;
- an end: nothing is stored for ever.

Limits that stay; the exploration counts the endings that show them

- written back: an old worker that ran beside the logout stores the whole record again. Old workers
  serve it until it expires; new workers never do;
- old logout: without watching, new workers don't notice a logout at an old worker;
- late answer: the answer to a request with the old cookie brings the older token back into the
  browser if it arrives after the answer of a rotation or of a sign-in.

Not covered: clocks that disagree, lost store writes (failover), Flask's cookie sessions, rolling
back, a rotation whose answer is lost, the number of attempts of the loops. A change of the roster
is one step here; its steps have a model of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Mapping
from typing import Any

from .explorer import Break, Broken, Model, Program, Record, Scenario, World, clock, follow

GRACE, OLD_END, UNTIL, MARK_END, LATER, OWN_END = 0.5, 1, 2, 2.5, 3, 9
NOBODY = None, None, None

Entries = frozenset[tuple[str, bool]]
Roster = tuple[int, Entries]

BREAKS = {
    name: Break(meaning, scenario)
    for name, (meaning, scenario) in {
        "no mark": ("nothing remembers the import", "three first requests"),
        "mark first": ("3 before 2", "three first requests"),
        "hand first": ("the answer leaves before 3", "three first requests"),
        "keep own": ("a loser goes on with its own session", "three first requests"),
        "mark, old": ("1 in the other order", "first request, two logouts"),
        "pointer": ("the mark is a pointer", "two logouts"),
        "rotate": ("only the winner answers with a token", "two first requests, time"),
        "no nonce": ("the key follows from the old id alone", "two first requests, logout"),
        "short mark": ("the mark ends with the old session", "old worker, logout, time"),
        "exact mark": ("the mark ends at SESSION_IMPORT_UNTIL", "old worker, logout, time"),
        "endless mark": ("the mark has no end", "two first requests, time"),
        "mark goes": ("it is deleted with the session", "idle expiry, two late requests"),
        "session first": ("a logout deletes the session first", "two first requests, logout"),
        "keep old": ("a logout leaves the old record", "two first requests, logout"),
        "answer first": ("a logout answers before it deletes", "two first requests, logout"),
        "grace": ("the sign-in rotates with a grace", "sign-in, late request, write"),
        "no enter": ("no entry in the roster", "user: two first requests, revoke all"),
        "enter last": ("entered after the answer", "user: two first requests, revoke all"),
        "enter once": ("only the creator enters it", "user: two first requests, revoke all"),
        "any epoch": ("entered with any epoch", "user: two first requests, revoke all"),
        "roster forgets": (
            "a roster whose epoch changed ends with its last session",
            "user: first request, revoke all, time",
        ),
        "no version": ("a save accepts any version", "three first requests"),
        "watch once": ("only the import looks at the old record", "old logout, watching"),
    }.items()
}


def end(w: World, key: str) -> Program:
    """A store's delete: follows pointers, removes the session first, then the pointers."""
    passed = []
    while True:
        yield
        there = w.store.get(key)
        if there is None or there.to is None:
            w.remove(key)
            break
        w.load(key)
        passed.append(key)
        key = there.to
    for key in reversed(passed):
        yield
        w.remove(key)


def rotated(
    w: World, me: str, key: str, record: Record, ends: float, root: str | None = None
) -> Generator[None, None, tuple[str | None, Record | None]]:
    """The new key and its record. The old key points there until ``ends``; 0: it becomes free."""
    new = f"N{me}" if root else f"{key}'"
    yield
    made = w.create(new, (root or record.value[0], record.value[1]), OWN_END)
    yield
    if w.turn(key, new if ends else None, record.version, ends):
        return new, made
    yield
    w.remove(new)
    return None, None


def roster(
    w: World, change: Callable[[int, Entries], Roster | None], ends: float = OWN_END
) -> Roster | None:
    """Change the roster in one step. Returns the new roster."""
    epoch, entries = w.store["roster"].value if "roster" in w.store else (0, frozenset())
    changed = change(epoch, entries)
    if changed:
        w.put("roster", changed, ends)
    return w.saw(changed)  # type: ignore[no-any-return]


def entered(w: World, key: str, broken: Broken) -> bool:
    def change(epoch: int, entries: Entries) -> Roster | None:
        if (key, False) in entries:
            return epoch, entries
        if (key, True) in entries or (epoch and "any epoch" not in broken):
            return None
        return epoch, entries | {(key, False)}

    return roster(w, change) is not None


def dropped(w: World, keys: Collection[str | None], ends: float = OWN_END) -> None:
    def change(epoch: int, left: Entries) -> Roster:
        return epoch, frozenset(entry for entry in left if entry[0] not in keys)

    roster(w, change, ends)


def by_old_cookie(w: Site, me: str, broken: Broken, user: bool) -> Generator[None, None, Any]:
    """The session's key and record, and the token that the answer brings."""
    found: dict[str, Record | None] = {}
    for key in ("mark", "old") if "mark, old" in broken else ("old", "mark"):
        yield
        if w.time >= UNTIL and not found:
            w.saw("imports are over")
            return NOBODY
        found[key] = w.load(key)
    old, mark = found["old"], found["mark"]
    made = None
    key = "R" if "no nonce" in broken else "R" + me
    if mark is None:
        if old is None:
            return NOBODY
        lives = {"short mark": OLD_END, "exact mark": UNTIL, "endless mark": 99}
        ends = next((lives[b] for b in broken if b in lives), MARK_END)
        taken = False
        for part in ("mark", "R") if "mark first" in broken else ("R", "mark"):
            if part == "R" and not taken:
                yield
                made = w.create(key, (key, old.value), OWN_END)
                if "hand first" in broken:
                    yield
                    w.answer(key)
            elif part == "mark" and "no mark" not in broken:
                yield
                taken = not w.create("mark", key, ends, key if "pointer" in broken else None)
        if taken and "keep own" not in broken:
            if made:
                yield
                w.remove(key)
                made = None
            yield
            mark = w.load("mark")
            if mark is None:
                return NOBODY
    at: str | None = key
    record = made
    if not made:
        at, record = yield from follow(w, (mark.to or mark.value) if mark else key)
        key = (mark.to or mark.value) if mark else key
    if at is None or record is None:
        return NOBODY
    token = key if at == key else None
    if "rotate" in broken and not made:
        token = None
        if w.time >= GRACE and at == key:
            token, record = yield from rotated(w, me, at, record, w.time + GRACE)
            at = token
    enters = not {"no enter", "enter last"} & broken and (made or "enter once" not in broken)
    if user and token and enters:
        yield
        if not entered(w, token, broken):
            yield
            w.remove("old")
            yield from end(w, token)
            return NOBODY
    return at, record, token


def request(
    w: Site,
    me: str,
    broken: Broken,
    does: str = "write",
    cookie: str = "jar",
    user: bool = False,
    answered: bool = True,
) -> Generator[None, None, bool]:
    """One request at a new worker; returns whether it was served."""
    yield
    began = w.saw((w.facts["jar"], w.facts["ended"], w.facts["old_ended"], w.facts["signed"]))
    new, old = {"jar": began[0], "old": (None, True)}.get(cookie, (cookie, False))
    key: str | None = None
    token: str | None = None
    record: Record | None = None
    if new:
        key, record = yield from follow(w, new)
    elif old:
        key, record, token = yield from by_old_cookie(w, me, broken, user)
    watches = w.facts["watching"] and w.time < OLD_END and not (new and "watch once" in broken)
    if key and watches:
        yield
        if w.load("old") is None:
            yield from end(w, key)
            key = None
    if key is None or record is None:
        if does == "logout":
            w.facts["ended"] = w.facts["logged_out"] = True  # the user is shown that
        return False
    w.serve(record, began, new is None)
    if does == "write":
        while key is not None and record is not None:
            yield
            value = record.value[0], record.value[1] | {me}
            if w.save(key, value, None if "no version" in broken else record.version):
                w.facts["saved"] |= {me}
                break
            key, record = yield from follow(w, key)
    elif does == "logout":
        yield from logout(w, key, broken, new is None)
        token = None
    elif does in ("rotate", "sign in"):
        root = "N" if does == "sign in" else None
        ends = w.time + GRACE if does == "rotate" or "grace" in broken else 0
        token, _ = yield from rotated(w, me, key, record, ends, root)
        w.facts["signed"] |= bool(root and token)
    if answered and token:
        yield
        w.answer(token)
    if user and token and "enter last" in broken:
        yield
        if not entered(w, token, broken):
            yield from end(w, token)
    return True


def logout(w: Site, key: str, broken: Broken, by_old: bool) -> Program:
    w.facts["asked"] = True
    for part in ("R", "old") if "session first" in broken else ("old", "R"):
        if part == "old" and "keep old" not in broken:
            yield
            w.remove("old")
        elif part == "R":
            if "answer first" in broken:
                w.facts["ended"] = True
            yield from end(w, "mark" if "pointer" in broken and by_old else key)
            if "mark goes" in broken:
                yield
                w.remove("mark")
    yield
    dropped(w, {key})
    yield
    w.saw("answered")
    w.facts.update(ended=True, logged_out=True, jar=(None, False))


def revoke_all(w: Site, broken: Broken) -> Program:
    w.facts["asked"] = True
    ends = OLD_END if "roster forgets" in broken else MARK_END
    yield
    changed = roster(w, lambda epoch, all_: (1, frozenset((key, True) for key, _ in all_)), ends)
    assert changed is not None
    keys = sorted(key for key, _ in changed[1])
    for key in keys:
        yield
        w.remove("old")
        yield from end(w, key)
    yield
    dropped(w, keys, ends)
    w.facts["ended"] = True


def old_worker(w: Site) -> Program:
    """Flask-Session: loads, and later stores the whole record for its full time, gone or not."""
    yield
    there = w.load("old")
    if there is not None:
        yield
        w.facts["limits"] |= set() if "old" in w.store else {"written back"}
        w.saw(w.put("old", there.value | {"w"}, LATER))


def old_logout(w: Site) -> Program:
    yield
    w.remove("old")
    w.facts["old_ended"] = True


def idle(w: Site, broken: Broken) -> Program:
    """The session is not used for as long as its idle timeout."""
    yield
    w.saw("idle")
    mark_goes = "mark goes" in broken
    for key in [key for key in w.store if key[0] == "R" or (key == "mark" and mark_goes)]:
        del w.store[key]
        w.facts["ended"] = True


class Site(World):
    def serve(self, record: Record, began: Any, by_old: bool) -> None:
        """The view sees the session. ``began``: the facts when the request began."""
        _, ended, old_ended, signed = began
        if ended or (old_ended and self.facts["watching"]):
            self.fault = "served after the end"
        elif old_ended:
            self.facts["limits"] |= {"old logout"}
        if record.value[0] == "N":
            if signed and by_old:
                self.fault = "the old cookie leads to the sign-in"
            return
        self.facts["roots"] |= {record.value[0]}
        if len(self.facts["roots"]) > 1:
            self.fault = "two sessions"

    def answer(self, token: str) -> None:
        self.saw("answered")
        self.facts["jar"] = (token, self.facts["jar"][1])
        self.facts["known"] |= {token}


def start(
    broken: Broken, imported: bool = False, watching: bool = False, user: bool = False
) -> Site:
    empty: frozenset[str] = frozenset()
    flags = dict.fromkeys(("asked", "ended", "logged_out", "old_ended", "signed"), False)
    sets = dict.fromkeys(("known", "roots", "saved", "limits"), empty)
    w = Site(jar=(None, True), watching=watching, user=user, **sets, **flags)
    w.store["old"] = Record(("old", 1), frozenset({"old"}), OLD_END)
    if imported:
        w.alone(lambda w: request(w, "z", broken, user=user), "z")
    return w


def leads(w: Site, key: str) -> Record | None:
    """The record that ``key`` leads to, through pointers."""
    there = w.store.get(key)
    while there is not None and there.to:
        there = w.store.get(there.to)
    return there


def probe(w: Site, broken: Broken, **how: Any) -> Any:
    return w.alone(lambda w: request(w, "probe", broken, user=w.facts["user"], **how))


def check(w: Site, broken: Broken) -> str:
    """The invariants of every state."""
    mark = w.store.get("mark")
    if mark and mark.ends > MARK_END:
        return "without an end"
    for cookie in ("old", *w.facts["known"]) if w.facts["ended"] else ():
        if probe(w.copy(), broken, does="read", cookie=cookie):
            return "served after the end"
    if w.facts["signed"] and probe(w.copy(), broken, does="read", cookie="old"):
        return "the old cookie leads to the sign-in"
    return ""


def final(w: Site, broken: Broken) -> str:
    """The invariants once no program runs any more."""
    facts = w.facts
    if facts["ended"]:
        left = facts["logged_out"] and "old" in w.store and "written back" not in facts["limits"]
        return "the old record is left after a logout" if left else ""
    live = [there for key in facts["known"] if (there := leads(w, key))]
    if any(not facts["saved"] <= there.value[1] for there in live):
        return "a write is lost"
    if facts["old_ended"] or (w.time >= UNTIL and not facts["jar"][0]):
        return ""
    later = w.copy()
    for answered in () if facts["asked"] else (False, False, True):
        # Two answers are lost, and each time a grace ends.
        later.store = {k: there for k, there in later.store.items() if not there.to or k == "mark"}
        later.time = max(later.time, GRACE)
        if not probe(later, broken, does="read", answered=answered):
            if any(leads(later, key) for key in facts["known"]):
                facts["limits"] |= {"late answer"}
                return ""
            return "no way in"
    probe(later, broken, does="logout")  # for good, also where a request crashed before
    return check(later, broken) or final(later, broken)


def scenarios(broken: Broken) -> Mapping[str, Scenario]:
    def at(me: str, **how: Any) -> Callable[[Site], Program]:
        return lambda w: request(w, me, broken, user=w.facts["user"], **how)

    def revoke(w: Site) -> Program:
        return revoke_all(w, broken)

    def going_idle(w: Site) -> Program:
        return idle(w, broken)

    def grace(w: Site) -> Program:
        return clock(w, GRACE)

    def times(w: Site) -> Program:
        return clock(w, OLD_END, UNTIL)

    a, b, c = at("a"), at("b"), at("c", does="read")
    late_a, late_b = at("a", cookie="old"), at("b", cookie="old", does="read")
    out, old_out = at("out", does="logout"), at("also", cookie="old", does="logout")
    turn, sign_in = at("turn", does="rotate"), at("in", does="sign in")
    user, known = {"user": True}, {"imported": True}
    return {
        name: Scenario(start, crashes, programs)
        for name, (start, crashes, programs) in {
            "three first requests": ({}, 1, {"a": a, "b": b, "c": c}),
            "two first requests, time": ({}, 1, {"a": a, "b": b, "clock": grace}),
            "two first requests, logout": ({}, 1, {"a": a, "b": b, "out": out}),
            "two logouts": ({}, 1, {"out": out, "also": old_out}),
            "first request, two logouts": ({}, 0, {"a": c, "out": out, "also": old_out}),
            "two late requests, logout": (known, 1, {"a": late_a, "b": late_b, "out": out}),
            "rotation, late request, write": (
                known,
                0,
                {"turn": turn, "a": late_a, "b": b, "clock": grace},
            ),
            "rotation, late request, logout": (known, 0, {"turn": turn, "a": late_a, "out": out}),
            "sign-in, late request, write": (known, 0, {"in": sign_in, "a": late_a, "b": b}),
            "sign-in in a first request": ({}, 0, {"in": sign_in, "a": a, "b": late_b}),
            "idle expiry, two late requests": (
                known,
                1,
                {"a": late_a, "b": late_b, "clock": going_idle},
            ),
            "old worker, first request, logout": ({}, 1, {"old": old_worker, "a": a, "out": out}),
            "old worker, logout, time": (
                known,
                1,
                {"old": old_worker, "out": out, "a": late_a, "clock": times},
            ),
            "user: two first requests, revoke all": (user, 1, {"a": a, "b": c, "all": revoke}),
            "user: first request, revoke all, time": (
                user,
                1,
                {"a": a, "old": old_worker, "all": revoke, "clock": times},
            ),
            "old logout": ({}, 1, {"a": a, "b": late_b, "off": old_logout}),
            "old logout, watching": ({"watching": True}, 1, {"a": a, "b": b, "off": old_logout}),
        }.items()
    }


MODEL = Model(BREAKS, scenarios, start, check, final)
