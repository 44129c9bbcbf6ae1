"""Model: a visitor's cart joins the user's at the sign-in exactly once, in every interleaving.

The user's values are one record, the anonymous session another, and no step changes both. Each step
is one atomic verb on one key. What a step makes of the records is decided by the real functions of
``flask_gsession.users.joins``. The carts add up, so that an item counted twice shows.

The protocol
  An anonymous session with values for a user has a join beside them: a random id that stays the
  same through rotations, and a revision, one higher with each save. Sign-in, after the password:
  1. load the session. It has no join (that its cart is empty now does not count): go on with 3.
     There is no session: go on with 4. The token is an old one: go on with 2, then with 4;
  2. load the user's record. It has a list of joins: for each id the revision and the values as
     they were joined. Its revision is not lower than the session's: go on with 3. Else save, in one
     step, the merged values and the join. The merge is three-way: its base are the values that were
     joined before (at first none), so that a repeat adds only what is new, and takes out what was
     taken out. Stale: once more from 2;
  3. rotate the session in the very version that was joined, without grace; the new one has nothing
     to join, and no join. Stale or gone: once more from 1;
  4. where nothing was rotated, create a new session. One behind an old token stays as it is;
  5. enter it in the roster (``roster_model.py``);
  6. unless a session stayed behind, close the join: its values go, its revision is endless, so that
     a sign-in that still runs cannot join again. It stays, some 20 bytes, for as long as the
     anonymous session could have lived, plus as long as a request may take;
  7. answer with the token.
  If that is interrupted, the browser signs in again: before 3 with its anonymous session, which has
  kept everything; after 3 with a token that leads nowhere, and the user's record has everything.

Invariants, in every state
  never twice     no item is counted twice in the user's cart
  nowhere lost    each acknowledged item is in the anonymous session, or in the user's cart
  nothing undone  what another device saved in the user's record stays there
and at the end
  exactly once    after a sign-in that was acknowledged or tried again, each acknowledged item is in
                  the user's cart once, and none that was taken out before; also what is put later
                  into a session that stayed behind, after its sign-in
  bounded         each join is closed if its sign-in was acknowledged, and all of them have an end

Limits: an aborted sign-in as one user, then a sign-in as another: both have the items. An item that
is taken out after an aborted sign-in stays with the user until the next one. After an abort past 3
the anonymous session is gone (as at any sign-in): its other values are lost. Its items are not.

Not covered: policies other than sums, values too large for their record, a roster that refuses the
sign-in (the items are then the user's, the new session is deleted), lost store writes (failover),
the expiry of the user's record by idleness, and the number of attempts of the loops.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from flask_gsession.users import joins as real
from flask_gsession.values.payload import CLOSED, Body, Join

from .explorer import Break, Broken, Model, Program, Scenario, World, clock, follow

HOUR = real.HOUR
GRACE, ANONYMOUS_END, OWN_END = HOUR / 2, 2 * HOUR, 9 * HOUR

Cart = frozenset[tuple[str, int]]
NOTHING: Cart = frozenset()

BREAKS = {
    name: Break(meaning, scenario)
    for name, (meaning, scenario) in {
        "cart only": ("1 looks only whether the cart is empty now", "sign-in, item taken out"),
        "no id": ("nothing is remembered", "sign-in"),
        "known: skip": ("a known id is never joined again", "sign-in, another tab"),
        "key": ("the join id is the session's key", "sign-in, rotation"),
        "hour": ("a join is forgotten after an hour", "double click, time"),
        "exact end": ("a join ends with the anonymous session", "double click, time"),
        "forget": ("step 6 drops the join", "double click"),
        "no revision": ("an older copy joins over a newer one", "double click, another tab"),
        "not closed": ("step 6 is left out", "sign-in"),
        "rotate first": ("3 before 2", "sign-in"),
        "two saves": ("values and join are saved one after the other", "sign-in"),
        "join, values": ("the same in the other order", "sign-in"),
        "any user version": ("the user's record is saved anyway", "sign-in, another device"),
        "any session version": ("step 3 does not insist on it", "sign-in, another tab"),
        "cart stays": ("the new session keeps the cart", "sign-in"),
        "id stays": ("the new session keeps the join id", "sign-in"),
        "old: nothing": ("an old token joins nothing", "sign-in, rotation"),
        "old: closed": ("the join of a session that stays behind is closed", "sign-in, rotation"),
    }.items()
}


def merged(base: Cart, mine: Cart, theirs: Cart) -> Cart:
    """The changes from ``base`` to ``mine``, applied to ``theirs``."""
    sums = dict(theirs)
    for sign, side in ((1, mine), (-1, base)):
        for item, number in side:
            sums[item] = sums.get(item, 0) + sign * number
    return frozenset((item, number) for item, number in sums.items() if number)


def values_of(cart: Cart) -> dict[str, bytes]:
    return {item: bytes((number,)) for item, number in cart}


def cart_of(values: Mapping[str, bytes]) -> Cart:
    return frozenset((item, raw[0]) for item, raw in values.items())


def combine(
    theirs: Mapping[str, bytes], base: Mapping[str, bytes], mine: Mapping[str, bytes]
) -> dict[str, bytes]:
    return values_of(merged(cart_of(base), cart_of(mine), cart_of(theirs)))


class Record(tuple[Cart, frozenset[tuple[bytes, int, Cart, int]]]):
    """The user's record as a value that can be compared."""

    __slots__ = ()

    @classmethod
    def of(cls, body: Body) -> Record:
        joins = ((j.id, j.revision, cart_of(j.values), j.ends_at) for j in body.joins)
        return cls((cart_of(body.values), frozenset(joins)))

    def body(self) -> Body:
        cart, joins = self
        known = (Join(id_, n, values_of(was), ends) for id_, n, was, ends in sorted(joins, key=str))
        return Body(values_of(cart), joins=tuple(known))


def change_user(
    w: World, change: Callable[[Body], Body | None], broken: Broken = frozenset()
) -> Program:
    """The one loop: load, change, save in that version."""
    while True:
        yield
        there = w.load("user")
        assert there is not None
        changed = change(there.value.body())
        if changed is None:
            return
        yield
        version = None if "any user version" in broken else there.version
        if w.save("user", Record.of(changed), version):
            return


def join(w: World, join_id: bytes, revision: int, mine: Cart, broken: Broken) -> Program:
    ends = {"hour": 0, "exact end": ANONYMOUS_END - HOUR}
    end = int(next((ends[b] for b in broken if b in ends), ANONYMOUS_END))

    def step(body: Body, *, values: bool = True, remember: bool = True) -> Body | None:
        known = [each for each in body.joins if each.id == join_id]
        if "known: skip" in broken and known:
            return None
        if "no revision" in broken and known and known[0].revision != CLOSED:
            if cart_of(known[0].values) == mine:
                return None
            lowered = Join(join_id, 0, known[0].values, known[0].ends_at)
            body = Body(body.values, joins=(*(j for j in body.joins if j.id != join_id), lowered))
        after = real.joined(
            body, Join(join_id, revision), values_of(mine), end, combine, int(w.time)
        )
        if after is None:
            return None
        joins = after.joins if remember and "no id" not in broken else body.joins
        return Body(after.values if values else body.values, joins=joins)

    steps: list[dict[str, bool]] = [{}]
    if "two saves" in broken:
        steps = [{"remember": False}, {"values": False}]
    elif "join, values" in broken:
        steps = [{"values": False}, {"remember": False}]
    for how in steps:
        yield from change_user(w, lambda body, how=how: step(body, **how), broken)  # type: ignore[misc]


def sign_in(w: World, me: str, broken: Broken, browser: str = "jar") -> Program:
    yield
    token = w.saw(w.facts[browser])
    new, joined, old = "N" + me, None, False
    while True:
        key, record = yield from follow(w, token)
        if record is None or key is None:
            break
        join_id, revision, cart = record.value
        old = key != token and key[0] != "N"
        if "key" in broken:
            join_id = key.encode()
        first = "rotate first" not in broken
        wanted = cart if "cart only" in broken else revision
        if wanted and first and not (old and "old: nothing" in broken):
            yield from join(w, join_id, revision, cart, broken)
            joined = join_id
        if old:
            record = None
            break
        yield
        stays = "cart stays" in broken or not first
        kept = cart if stays else NOTHING
        value = (join_id, revision, kept) if "id stays" in broken else (_id(new), int(stays), kept)
        made = w.create(new, value, OWN_END)
        assert made is not None
        yield
        if w.turn(key, None, None if "any session version" in broken else record.version):
            if cart and not first:
                yield from join(w, join_id, revision, cart, broken)
                joined = join_id
                yield
                w.save(new, (_id(new), 0, NOTHING), made.version)
            break
        yield
        w.remove(new)
    if record is None:
        yield
        w.create(new, (_id(new), 0, NOTHING), OWN_END)
    if joined and "not closed" not in broken and not (old and "old: closed" not in broken):
        done = joined

        def close(body: Body) -> Body | None:
            if "forget" in broken:
                return Body(body.values, joins=tuple(j for j in body.joins if j.id != done))
            return real.closed(body, done, int(w.time))

        yield from change_user(w, close, broken)
    yield
    w.saw("answered")
    w.facts[browser] = new
    w.facts["joined"] |= {joined} if joined and not old else set()
    w.facts["acknowledged"] |= {browser}


def _id(key: str) -> bytes:
    return b"id " + key.encode()


def tab(w: World, item: str, count: int = 1, browser: str = "jar") -> Program:
    """Another tab of a visitor puts an item into the cart, or takes it out (-1)."""
    yield
    token = w.saw(w.facts[browser])
    while True:
        key, record = yield from follow(w, token)
        if record is None or key is None or key[0] == "N":
            return
        join_id, revision, cart = record.value
        (after,) = real.next_join((Join(join_id, revision),), ())
        yield
        if w.save(key, (join_id, after.revision, change(cart, item, count)), record.version):
            w.facts["anonymous"] |= {item}
            if count < 0:
                w.facts["anonymous"] -= {item}
                w.facts["taken_out"] |= {item}
            return


def change(cart: Cart, item: str, count: int) -> Cart:
    if count > 0:
        return merged(NOTHING, frozenset({(item, count)}), cart)
    return merged(frozenset({(item, -count)}), NOTHING, cart)


def device(w: World, item: str) -> Program:
    """Another device of the user."""

    def put(body: Body) -> Body:
        return Body(values_of(change(cart_of(body.values), item, 1)), joins=body.joins)

    yield from change_user(w, put)
    w.facts["saved"] |= {item}


def rotation(w: World) -> Program:
    """The application rotates the anonymous session, with grace."""
    yield
    token = w.saw(w.facts["jar"])
    key, record = yield from follow(w, token)
    if record and key == token:
        yield
        w.create(key + "'", record.value, ANONYMOUS_END)
        yield
        if w.turn(key, key + "'", record.version, GRACE):
            yield
            w.saw("answered")
            w.facts["jar"] = key + "'"
            w.facts["given"] |= {key + "'"}
        else:
            yield
            w.remove(key + "'")


def logout(w: World) -> Program:
    yield
    token = w.saw(w.facts["jar"])
    key, _ = yield from follow(w, token)
    if key:
        yield
        w.facts["left"] |= key[0] == "A"
        w.remove(key)


def start(broken: Broken, two: bool = False) -> World:
    w = World(
        jar="A",
        other="B" if two else None,
        anonymous=frozenset({"a", "b"} if two else {"a"}),
        taken_out=frozenset(),
        saved=frozenset({"u"}),
        joined=frozenset(),
        given=frozenset(),
        acknowledged=frozenset(),
        left=False,
    )
    w.put("A", (b"id A", 1, frozenset({("a", 1)})), ANONYMOUS_END)
    if two:
        w.put("B", (b"id B", 1, frozenset({("b", 1)})), ANONYMOUS_END)
    w.put("user", Record((frozenset({("u", 1)}), frozenset())), OWN_END)
    return w


def check(w: World, broken: Broken) -> str:
    """The invariants of every state."""
    cart = dict(w.store["user"].value[0])
    if any(n > 1 for n in cart.values()):
        return "an item is counted twice"
    if any(item not in cart for item in w.facts["saved"]):
        return "what another device saved is lost"
    held = {
        item
        for key, record in w.store.items()
        if key[0] in "AB" and not record.to
        for item, _ in record.value[2]
    }
    gone = w.facts["left"] or w.time >= ANONYMOUS_END
    if not gone and not w.facts["anonymous"] <= {*cart, *held}:
        return "an item is lost"
    return ""


def final(w: World, broken: Broken) -> str:
    """The invariants once nobody runs any more, and each browser has signed in, perhaps again."""
    for browser in ("jar", "other"):
        if w.facts[browser] and browser not in w.facts["acknowledged"]:
            w.alone(lambda w, browser=browser: sign_in(w, "again", broken, browser), "again")
    fault = check(w, broken) or _behind(w, broken)
    cart, joins = w.store["user"].value
    if w.facts["left"] or w.time >= ANONYMOUS_END:
        return fault
    if not fault and not w.facts["anonymous"] <= dict(cart).keys():
        fault = "an item is lost"
    if not fault and dict(cart).keys() & w.facts["taken_out"]:
        fault = "what was taken out is back"
    if not fault and any(j[0] in w.facts["joined"] and j[2] for j in joins):
        fault = "a join stays open"
    if not fault and w.facts["jar"][0] == "N" and w.facts["jar"] in w.store:
        # signs in again in the same session; then leaves the user, takes a new item, and comes back
        w.alone(lambda w: sign_in(w, "twice", broken), "twice")
        join_id, revision, old = w.store[w.facts["jar"]].value
        w.put("A+", (join_id, revision + 1, change(old, "new", 1)), ANONYMOUS_END)
        w.facts.update(jar="A+", anonymous=w.facts["anonymous"] | {"new"})
        w.alone(lambda w: sign_in(w, "back", broken), "back")
        fault = check(w, broken)
    return fault


def _behind(w: World, broken: Broken) -> str:
    """A browser that goes on with a session that stayed behind: its later items join, too."""
    behind = [key for key in w.facts["given"] if key[0] == "A" and key in w.store]
    if not behind or w.time >= ANONYMOUS_END:
        return ""
    later = w.copy()
    later.facts["jar"] = behind[0]
    later.alone(lambda w: tab(w, "later"), "tab")
    later.alone(lambda w: sign_in(w, "later", broken), "later")
    cart = dict(later.store["user"].value[0])
    return check(later, broken) or ("" if "later" in cart else "a later item is lost")


def scenarios(broken: Broken) -> Mapping[str, Scenario]:
    def enters(me: str, browser: str = "jar") -> Callable[[World], Program]:
        return lambda w: sign_in(w, me, broken, browser)

    def add(w: World) -> Program:
        return tab(w, "x")

    def out(w: World) -> Program:
        return tab(w, "a", -1)

    def elsewhere(w: World) -> Program:
        return device(w, "v")

    def hour(w: World) -> Program:
        return clock(w, HOUR)

    def end(w: World) -> Program:
        return clock(w, HOUR, ANONYMOUS_END)

    one, two, other = enters("1"), enters("2"), enters("3", "other")
    carts = {"two": True}
    return {
        name: Scenario(begins, crashes, programs)
        for name, (begins, crashes, programs) in {
            "sign-in": ({}, 2, {"one": one}),
            "sign-in, another tab": ({}, 1, {"one": one, "tab": add}),
            "sign-in, item taken out": ({}, 1, {"one": one, "tab": out}),
            "sign-in, another device": ({}, 1, {"one": one, "device": elsewhere}),
            "sign-in, rotation": ({}, 1, {"one": one, "turn": rotation}),
            "sign-in, logout": ({}, 1, {"one": one, "out": logout}),
            "sign-in, time": ({}, 1, {"one": one, "clock": hour}),
            "double click": ({}, 1, {"one": one, "two": two}),
            "double click, time": ({}, 1, {"one": one, "two": two, "clock": end}),
            "double click, another tab": ({}, 1, {"one": one, "two": two, "tab": add}),
            "double click, item taken out": ({}, 1, {"one": one, "two": two, "tab": out}),
            "double click, another device": ({}, 0, {"one": one, "two": two, "device": elsewhere}),
            "double click, rotation": ({}, 0, {"one": one, "two": two, "turn": rotation}),
            "double click, logout": ({}, 1, {"one": one, "two": two, "out": logout}),
            "two devices with two carts": (carts, 1, {"one": one, "other": other}),
            "two devices, another tab": (carts, 1, {"one": one, "other": other, "tab": add}),
        }.items()
    }


MODEL = Model(BREAKS, scenarios, start, check, final)
