"""The protocol of users and devices: every interleaving and crash of its steps, one key at a time.

The steps on the roster are the real ones of ``flask_gsession.users.roster``; each is one
compare-and-set. A session's value names its device, its user, and the session it was rotated from.

    python -m tests.simulation.roster_model          # explores all, then shows that breaks are seen

The protocol
  Sign-in    notes the roster's epoch before the password is checked; looks at epoch and cap;
             stores the new session (rotation without grace, or create); *enters* it; deletes the
             sessions of all ending devices; answers with the token; drops the ending devices.
             Refused by the look: nothing was changed. By the entry: deletes the new session.
             A session that was bound to another user leaves that roster after the answer.
  Rotation   replaces the session; *moves* its device to the new key; answers with the token.
             Refused: deletes the new session.
  Revoking   *marks* devices as ending, and changes the epoch if it is about all or all others;
             deletes each session; drops the devices; is acknowledged.
  Logout     deletes the session, then drops its device.
  Unbinding  stores the session without its user, then drops its device.
  Touch      before a save: *touches* the roster. Refused: loads the session again. If it was
             rotated meanwhile, touches with the new key, else deletes it.
  Adoption   (a session from before this version) *enters* it, then stores the user with it. In
             this order, since it is served already: who revokes meanwhile deletes it.
  Import     stores the session as unverified, then *enters* it. A request that finds it so touches
             the roster before it is served.

Invariants
  revoked    once a revocation is acknowledged, no session that it names is served
  listed     a session that is served is in the roster, or the one that it was rotated from is
  cap        never are more sessions of a user served than allowed
  kept       no session ends unless somebody ended it
  finished   what a crash left of a revocation ends with the next sign-in or touch
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

from msgspec.structs import replace

from flask_gsession.users import roster as real
from flask_gsession.users.roster import EMPTY, Device, Policy, Roster, Since

from .explorer import NOTHING, Broken, Explored, Program, Record, World, explore, follow

NEVER = 2**31  # seconds, or any time
OLD, NEW = 1000, 2000  # milliseconds: before and after a revocation, which is at 1500
REVOKED = 1500

#: By name: the broken step, and a scenario that shows it.
BREAKS = {
    "no epoch": ("the entry ignores the epoch", "sign-in, revoke all"),
    "hand first": ("the token leaves before the entry", "sign-in, revoke all"),
    "enter first": ("the session is stored after the entry", "sign-in, revoke all"),
    "late victims": ("victims of the cap are deleted after the answer", "two sign-ins, cap"),
    "own victims": ("a sign-in leaves what others marked", "crash, then sign-in"),
    "count first": ("the cap is looked at before, not with the entry", "two sign-ins, refuse"),
    "no move": ("a rotation doesn't move its device", "rotation, revoke all"),
    "move any": ("a rotation moves a device that is ending", "rotation, revoke all"),
    "move late": ("the token of a rotation leaves before the move", "rotation, revoke all"),
    "no mark": ("revoking reads the list and deletes", "rotation, revoke all"),
    "keep epoch": ("revoking all marks, but keeps the epoch", "sign-in, revoke all"),
    "drop first": ("revoking drops before it deletes", "crash, then sign-in"),
    "acknowledge first": ("revoking answers before it deletes", "two devices, revoke all"),
    "drop device": ("a logout drops the device, not the key", "rotation, logout"),
    "unbind first": ("unbinding drops before it stores", "unbind, save"),
    "unbind only": ("unbinding leaves the roster as it is", "unbind, save"),
    "rebind only": ("a sign-in as somebody else leaves the first roster as it is", "other user"),
    "touch any": ("a touch enters whoever isn't a member", "failover, save"),
    "touch alone": ("a touch leaves what a crashed revocation left", "rotation, revoke one"),
    "no touch": ("a save doesn't touch", "failover, save"),
    "touch own": ("a touch doesn't know the predecessor", "rotation crashes, save"),
    "touch once": ("a refused touch doesn't look whether it was rotated", "rotation, save"),
    "adopt late": ("an adopted session is stored with its user, then entered", "adoption, crash"),
    "adopt any": ("adoption ignores the last revocation", "adoption, revoke all"),
    "import any": ("an import ignores the last revocation", "import, revoke all"),
    "import first": ("an import enters, then stores", "import, revoke all"),
    "import verified": ("an imported session is served before it is entered", "import, crash"),
}


class Users(World):
    """A store with rosters in it."""

    def change(self, user: str, function: Callable[[Roster], tuple[Roster, Any]]) -> Any:
        """One compare-and-set: ``function`` makes the new roster, and an answer."""
        before = rosters(self, user)
        after, answer = function(before)
        if after != before:
            self.put(roster_of(user), after, NEVER)
        return self.saw(answer)


class Session(NamedTuple):
    """The value of a session's record. ``signed_in``: the user of a session from before."""

    device: str = ""
    user: str = ""
    predecessor: str | None = None
    verified: bool = True
    era: int = OLD
    signed_in: str = ""
    wrote: frozenset[str] = frozenset()


def roster_of(user: str) -> str:
    return f"{user}'s roster"


def rosters(w: Users, user: str) -> Roster:
    there = w.store.get(roster_of(user))
    return EMPTY if there is None else there.value  # type: ignore[no-any-return]


def device(device_id: str, key: str) -> Device:
    return Device(id=device_id, key=key, created=0, seen=0, expires=NEVER)


class Site:
    """The programs of one scenario. Each method is a program, except the helpers at the end."""

    def __init__(self, broken: Broken, cap: int = real.MOST_DEVICES, policy: Policy = "oldest"):
        self.broken, self.cap, self.policy = broken, cap, policy

    def sign_in(self, w: Users, me: str, token: str, user: str = "u") -> Program:
        yield
        era = NEW if w.facts["marked"] else OLD
        since = Since(epoch=w.saw(rosters(w, user).epoch))
        key, there = yield from follow(w, token)
        if there is None:
            return
        before: Session = there.value
        yield
        look: Roster = w.saw(rosters(w, user))
        if real.is_revoked_since(look, since) or real.is_full(look, self.cap, self.policy):
            w.facts["refused"] |= {me}
            return
        session = before._replace(device=me, user=user, predecessor=None, era=era)
        new, entered = f"{me}'s", None
        if "enter first" in self.broken:
            entered = yield from self._enter(w, user, session.device, new, since)
        yield
        w.create(new, session, NEVER)
        yield
        if not w.turn(key, None, there.version):
            yield
            w.remove(new)
            return
        if "hand first" in self.broken:
            yield
            know(w, new)
        if entered is None:
            entered = yield from self._enter(w, user, session.device, new, since)
        if entered.refused:
            w.facts["refused"] |= {me}
            w.facts["ended"] |= {before.device} if before.device else set()
            yield from delete(w, new)
            if before.user and before.user != user:
                yield from self._drop(w, before.user, {key})
            return
        ending = entered.roster.ending
        w.facts["ended"] |= {each.id for each in ending}
        if "own victims" in self.broken:
            ending = [each for each in ending if each in rosters(w, user).ending][-entered.over :]
            ending = ending if entered.over else []
        if "late victims" not in self.broken:
            for each in ending:
                yield from delete(w, each.key)
        yield
        know(w, new)
        if "late victims" in self.broken:
            for each in ending:
                yield from delete(w, each.key)
        yield from self._drop(w, user, {each.key for each in ending})
        if before.user and before.user != user:
            if "rebind only" not in self.broken:
                yield from self._drop(w, before.user, {key})
            w.facts["unbound"] |= {before.device}

    def rotate(self, w: Users, me: str, token: str, grace: bool = True) -> Program:
        key, there = yield from follow(w, token)
        if there is None or key != token:
            return  # an old token doesn't rotate
        session: Session = there.value
        new = f"{key}>{me}"
        yield
        w.create(new, session._replace(predecessor=key), NEVER)
        yield
        if not w.turn(key, new if grace else None, there.version):
            yield
            w.remove(new)
            return
        if "move late" in self.broken:
            yield
            know(w, new)
        if session.user and "no move" not in self.broken:
            replaces = {key, session.predecessor or key}

            def move(roster: Roster) -> tuple[Roster, str]:
                found = roster.by_id(session.device)
                if "move any" in self.broken and found is not None:
                    return real._with(roster, replace(found, key=new)), ""
                moved = real.move(roster, session.device, new, replaces)
                return moved.roster, moved.refused

            yield
            if w.change(session.user, move):
                yield from delete(w, new)
                return
        yield
        know(w, new)

    def save(self, w: Users, me: str, token: str) -> Program:
        """A request that is slow, and whose touch is due."""
        key, there = yield from follow(w, token)
        touched = False
        while there is not None:
            session: Session = there.value
            if session.user and not touched and "no touch" not in self.broken:
                yield
                refused = self._touch(w, session, key)
                touched = not refused
                if refused:
                    was = key
                    if "touch once" not in self.broken:
                        key, there = yield from follow(w, token)
                    if there is None or (key != was and there.value.user):
                        continue
                    if not there.value.user:
                        continue  # it was unbound since
                    yield from delete(w, key)
                    yield from self._finish(w, session.user)
                    return
                yield from self._finish(w, session.user)
            yield
            changed = session._replace(wrote=session.wrote | {me}, verified=True)
            if w.save(key, changed, there.version):
                return
            key, there = yield from follow(w, token)

    def unbind(self, w: Users, me: str, token: str) -> Program:
        key, there = yield from follow(w, token)
        while there is not None:
            session: Session = there.value
            keys = {key, session.predecessor or key}
            if "unbind first" in self.broken:
                yield from self._drop(w, session.user, keys)
            yield
            if w.save(key, session._replace(device="", user="", predecessor=None), there.version):
                w.facts["ended"] |= {session.device}
                if not {"unbind first", "unbind only"} & self.broken:
                    yield from self._drop(w, session.user, keys)
                w.facts["unbound"] |= {session.device}
                return
            key, there = yield from follow(w, token)

    def logout(self, w: Users, me: str, token: str) -> Program:
        _, there = yield from follow(w, token)
        if there is None:
            return
        session: Session = there.value
        w.facts["ended"] |= {session.device}
        keys = yield from delete(w, token)
        if "drop device" in self.broken:
            found = [each.key for each in rosters(w, session.user).devices]
            keys |= set(found)
        yield from self._drop(w, session.user, keys | {session.predecessor or token})

    def revoke(self, w: Users, me: str, only: str = "", keep: str | None = None) -> Program:
        yield
        if "no mark" in self.broken:
            ending = w.saw(rosters(w, "u").devices)
        else:

            def step(roster: Roster) -> tuple[Roster, Any]:
                if only:
                    after = real.mark_ending(roster, {only})
                else:
                    after = real.revoke_all(roster, REVOKED, 0, keep)
                if "keep epoch" in self.broken:
                    after = replace(after, epoch=roster.epoch)
                return after, after.ending

            ending = w.change("u", step)
        w.facts["marked"] = True
        w.facts["ended"] |= {each.id for each in ending}
        if "acknowledge first" in self.broken:
            w.facts["acknowledged"] = True
        keys = {each.key for each in ending}
        if "drop first" in self.broken:
            yield from self._drop(w, "u", keys)
        for each in ending:
            yield from delete(w, each.key)
        yield from self._drop(w, "u", keys)
        yield
        w.saw("acknowledged")
        w.facts["acknowledged"] = True

    def adopt(self, w: Users, me: str, token: str) -> Program:
        """A save of a session that was signed in before this version."""
        key, there = yield from follow(w, token)
        while there is not None and not there.value.user:
            session: Session = there.value
            bound = session._replace(device=me, user=session.signed_in)
            # Its creation is all that is known of its sign-in.
            since = (
                Since(began=session.era) if "adopt any" not in self.broken else Since(began=9999)
            )
            if "adopt late" in self.broken:
                yield
                saved = w.save(key, bound, there.version)
                if not saved:
                    key, there = yield from follow(w, token)
                    continue
            entered = yield from self._enter(w, session.signed_in, me, key, since)
            if entered.refused:
                w.facts["ended"] |= {me}
                yield from delete(w, key)
                return
            if "adopt late" in self.broken:
                return
            assert entered.device is not None
            yield
            if w.save(key, bound._replace(device=entered.device.id), there.version):
                return
            key, there = yield from follow(w, token)

    def bring(self, w: Users, me: str, key: str, era: int = OLD) -> Program:
        """The import of an archive with a session whose token the client still has."""
        since = Since(began=era if "import any" not in self.broken else 9999)
        session = Session(me, "u", verified="import verified" in self.broken, era=era)
        if "import first" in self.broken:
            entered = yield from self._enter(w, "u", me, key, since)
            if not entered.refused:
                yield
                w.create(key, session._replace(verified=True), NEVER)
            return
        yield
        w.create(key, session, NEVER)
        entered = yield from self._enter(w, "u", me, key, since)
        if entered.refused:
            w.facts["ended"] |= {me}
            yield from delete(w, key)

    def failover(self, w: Users, me: str, key: str, session: Session) -> Program:
        """Another server takes over the sessions, and hasn't heard of the last changes."""
        yield
        w.saw("failover")
        w.store[key] = Record((me, 0), session, NEVER)
        w.facts["back"] |= {session.device}

    # -- steps

    def _enter(self, w: Users, user: str, device_id: str, key: str, since: Since) -> Program:
        cap = real.MOST_DEVICES if "count first" in self.broken else self.cap

        def step(roster: Roster) -> tuple[Roster, Any]:
            since_ = Since(epoch=roster.epoch) if "no epoch" in self.broken else since
            entered = real.enter(roster, device(device_id, key), since_, cap, self.policy)
            return entered.roster, entered

        yield
        return w.change(user, step)

    def _touch(self, w: Users, session: Session, key: str) -> str:
        def step(roster: Roster) -> tuple[Roster, str]:
            before = {session.predecessor or key} if "touch own" not in self.broken else ()
            after = real.touch(
                roster, session.device, key, before, seen=0, expires=NEVER, network=b""
            )
            if after.refused and "touch any" in self.broken:
                return replace(roster, devices=(*roster.devices, device(session.device, key))), ""
            return after.roster, after.refused

        return w.change(session.user, step)  # type: ignore[no-any-return]

    def _finish(self, w: Users, user: str) -> Program:
        """A touch finishes the work that another program left."""
        ending = () if "touch alone" in self.broken else rosters(w, user).ending
        for each in ending:
            yield from delete(w, each.key)
        if ending:
            yield from self._drop(w, user, {each.key for each in ending})

    def _drop(self, w: Users, user: str, keys: set[str]) -> Program:
        yield
        w.change(user, lambda roster: (real.drop(roster, keys), None))


def know(w: Users, key: str) -> None:
    """The answer leaves."""
    w.saw("answered")
    w.facts["known"] |= {key}


def delete(w: Users, key: str) -> Program:
    """A store's delete. Deletes the sessions behind pointers first. Returns the keys."""
    passed = {key}
    pointers = []
    while True:
        yield
        there = w.store.get(key)
        if there is None or there.to is None:
            w.remove(key)
            break
        w.load(key)
        pointers.append(key)
        key = there.to
        passed.add(key)
    for key in reversed(pointers):
        yield
        there = w.store.get(key)
        if there is not None and there.to is not None:
            w.remove(key)
        else:
            w.load(key)
    return passed


# -- invariants


def served(w: Users) -> dict[str, Session]:
    """The sessions that clients are served with the tokens they have, by key."""
    found = {}
    for key in w.facts["known"]:
        for _ in range(5):
            there = w.store.get(key)
            if there is None or there.to is None:
                break
            key = there.to
        if there is None or there.to is not None:
            continue
        session: Session = there.value
        if session.user and not session.verified:
            # A request touches the roster first, and serves nothing if that is refused.
            touched = real.touch(
                rosters(w, session.user),
                session.device,
                key,
                {session.predecessor or key},
                seen=0,
                expires=NEVER,
                network=b"",
            )
            if touched.refused:
                continue
        found[key] = session
    return found


def check(w: Users, site: Site) -> str:
    sessions = served(w)
    of_user = [session for session in sessions.values() if session.user == "u"]
    if len(of_user) > site.cap:
        return "cap"
    kept, back = w.facts["kept"], w.facts["back"]
    if w.facts["acknowledged"]:
        named = w.facts["named"]
        for session in of_user:
            if session.device in kept | back or session.era != OLD:
                continue
            if not named or session.device in named:
                return "revoked"
    return ""


def final(w: Users, site: Site) -> str:
    return check(w, site) or _listed(w) or _kept(w) or _finished(w, site)


def _listed(w: Users) -> str:
    for key, session in served(w).items():
        if session.device in w.facts["back"]:
            continue
        if session.user:
            member = rosters(w, session.user).by_id(session.device)
            if member is None or member.key not in (key, session.predecessor):
                return "not listed"
    devices = [each.device for each in served(w).values() if each.device not in w.facts["back"]]
    for user in "up":
        for each in rosters(w, user).members:
            if each.id in w.facts["unbound"]:
                return "listed, though it left"
            if devices.count(each.id) > 1:
                return "two sessions of one device"
    return ""


def _kept(w: Users) -> str:
    ended, devices = w.facts["ended"], {each.device for each in served(w).values()}
    lost = w.facts["keeps"] - ended - devices - w.facts["unbound"]
    return "a session was lost" if lost else ""


def _finished(w: Users, site: Site) -> str:
    """Later, somebody signs in; everybody else's request saves; and all are revoked."""
    ending = {each.id for each in rosters(w, "u").ending}
    for token in sorted(w.facts["known"]):
        later = _later(w)
        _, there = later.alone(partial(follow, key=token), "look")
        if there is None or not there.value.user:
            continue
        later.alone(partial(site.save, me="saver", token=token), "saver")
        own = there.value.device
        later.facts["back"] -= {own}
        served_ = served(later).values()
        if any(each.device in ending and there.value.user == "u" for each in served_):
            return "not finished by a touch"
        fault = check(later, site)
        if fault:
            return f"{fault}, after a touch"
    later = _later(w)
    late = Site(site.broken, site.cap)
    later.store["later"] = Record(("later", 0), Session(era=NEW), NEVER)
    later.alone(partial(late.sign_in, me="late", token="later"), "late")
    if any(each.device in ending for each in served(later).values()):
        return "not finished by a sign-in"
    fault = check(later, site)
    if fault:
        return f"{fault}, after a sign-in"
    later.alone(partial(site.revoke, me="last"), "last")
    left = {each.device for each in served(later).values() if each.user == "u"}
    if left - w.facts["back"]:
        return "revoked, at last"
    return ""


def _later(w: Users) -> Users:
    later = w.copy()
    later.facts["acknowledged"] = later.facts["marked"]
    return later


# -- the scenarios

Make = Callable[[Broken], tuple[Users, Site, dict[str, Callable[[Users], Program]]]]


def world(
    *sessions: tuple[str, Session], known: tuple[str, ...] = (), roster: tuple[Device, ...] = ()
) -> Users:
    none: frozenset[str] = frozenset()
    w = Users(
        known=frozenset(known) | {key for key, _ in sessions},
        **dict.fromkeys(("refused", "ended", "unbound", "back", "kept", "named", "keeps"), none),
        marked=False,
        acknowledged=False,
    )
    for key, session in sessions:
        w.store[key] = Record(("start", 0), session, NEVER)
    if roster:
        w.store[roster_of("u")] = Record(("start", 0), Roster(devices=roster), NEVER)
    return w


X, Y = ("x", Session("X", "u")), ("y", Session("Y", "u"))
DX, DY = device("X", "x"), device("Y", "y")
ANON, OTHER = ("a", Session()), ("b", Session())
BEFORE = ("o", Session(signed_in="u"))


def scenarios(broken: Broken) -> Mapping[str, tuple[Users, Site, int, Mapping[str, Any]]]:
    """By name: how the store begins, the site, how many crashes, and the programs."""
    s = Site(broken)

    def run(program: Any, *args: Any, **how: Any) -> Any:
        return lambda w, me: program(w, me, *args, **how)

    one, refuse, two = Site(broken, 1), Site(broken, 1, "refuse"), Site(broken, 2)
    back = run(s.failover, "x", X[1])
    all_, out = run(s.revoke), run(s.logout, "x")
    return {
        "sign-in, revoke all": (world(ANON, X, roster=(DX,)), s, 1,
            {"n": run(s.sign_in, "a"), "all": all_}),
        "two sign-ins of one session": (world(ANON, X, roster=(DX,)), s, 1,
            {"n": run(s.sign_in, "a"), "m": run(s.sign_in, "a"), "all": all_}),
        "two sign-ins, cap": (world(ANON, OTHER, X, roster=(DX,)), one, 1,
            {"n": run(one.sign_in, "a"), "m": run(one.sign_in, "b")}),
        "two sign-ins, cap of two": (world(ANON, OTHER, X, Y, roster=(DX, DY)), two, 0,
            {"n": run(two.sign_in, "a"), "m": run(two.sign_in, "b")}),
        "two sign-ins, refuse": (world(ANON, OTHER), refuse, 1,
            {"n": run(refuse.sign_in, "a"), "m": run(refuse.sign_in, "b")}),
        "logout, sign-in, refuse": (world(ANON, X, roster=(DX,)), refuse, 1,
            {"n": run(refuse.sign_in, "a"), "out": run(refuse.logout, "x")}),
        "crash, then sign-in": (world(ANON, X, Y, roster=(DX, DY)), s, 1,
            {"all": run(s.revoke), "n": run(s.sign_in, "a")}),
        "cap, rotation": (world(ANON, X, roster=(DX,)), one, 1,
            {"n": run(one.sign_in, "a"), "turn": run(one.rotate, "x", grace=False)}),
        "rotation, revoke all": (world(X, roster=(DX,)), s, 1,
            {"turn": run(s.rotate, "x", grace=False), "all": all_}),
        "rotation with grace, revoke all": (world(X, roster=(DX,)), s, 1,
            {"turn": run(s.rotate, "x"), "all": all_, "save": run(s.save, "x")}),
        "rotations, revoke others": (noting(world(X, Y, roster=(DX, DY)), kept="X"), s, 0,
            {"turn": run(s.rotate, "x"), "y": run(s.rotate, "y", grace=False),
             "others": run(s.revoke, keep="X")}),
        "rotation, revoke one": (noting(world(X, Y, roster=(DX, DY)), named="X"), s, 1,
            {"turn": run(s.rotate, "x"), "one": run(s.revoke, only="X"),
             "save": run(s.save, "y")}),
        "two devices, revoke all": (world(X, Y, roster=(DX, DY)), s, 1,
            {"all": all_, "also": run(s.revoke)}),
        "rotation, logout": (noting(world(X, roster=(DX,)), keeps="X"), s, 0,
            {"turn": run(s.rotate, "x", grace=False), "out": out}),
        "rotation with grace, logout": (world(X, roster=(DX,)), s, 1,
            {"turn": run(s.rotate, "x"), "out": out, "save": run(s.save, "x")}),
        "rotation, save": (noting(world(X, roster=(DX,)), keeps="X"), s, 0,
            {"turn": run(s.rotate, "x"), "save": run(s.save, "x")}),
        "rotation crashes, save": (noting(world(X, roster=(DX,)), keeps="X"), s, 1,
            {"turn": run(s.rotate, "x"), "save": run(s.save, "x")}),
        "unbind, save": (noting(world(X, roster=(DX,)), keeps="X"), s, 1,
            {"un": run(s.unbind, "x"), "save": run(s.save, "x")}),
        "unbind, revoke all, rotation": (world(X, roster=(DX,)), s, 1,
            {"un": run(s.unbind, "x"), "turn": run(s.rotate, "x"), "all": all_}),
        "other user": (world(X, Y, roster=(DX, DY)), s, 1,
            {"n": run(s.sign_in, "x", "p"), "save": run(s.save, "y")}),
        "other user, revoke all": (world(X, roster=(DX,)), s, 1,
            {"n": run(s.sign_in, "x", "p"), "all": all_, "save": run(s.save, "x")}),
        "failover, save": (world(X, roster=(DX,)), s, 0,
            {"all": then(s.revoke, s.failover, "x", X[1]), "save": run(s.save, "x")}),
        "crash, failover, save": (world(X, roster=(DX,)), s, 1,
            {"all": all_, "back": back, "save": run(s.save, "x")}),
        "failover of a rotation, save": (world(X, roster=(DX,)), s, 0,
            {"turn": run(s.rotate, "x", grace=False), "back": back, "save": run(s.save, "x")}),
        "adoption, revoke all": (world(BEFORE), s, 1, {"M": run(s.adopt, "o"), "all": all_}),
        "adoption, crash": (world(BEFORE), s, 1,
            {"M": run(s.adopt, "o"), "save": run(s.adopt, "o")}),
        "import, revoke all": (world(known=("i",)), s, 1,
            {"I": run(s.bring, "i"), "all": all_, "save": run(s.save, "i")}),
        "import, crash": (world(known=("i",)), s, 1, {"I": run(s.bring, "i"), "all": all_}),
    }  # fmt: skip


def then(first: Any, second: Any, *args: Any) -> Any:
    """One program after the other."""

    def both(w: Users, me: str) -> Program:
        yield from first(w, me)
        yield from second(w, me, *args)

    return both


def noting(w: Users, **facts: str) -> Users:
    """``kept`` from a revocation, ``named`` by it, or ``keeps`` unless somebody ends it."""
    w.facts.update({name: frozenset({device_id}) for name, device_id in facts.items()})
    return w


#: Those that take seconds with a crash.
LONG = ("two sign-ins of one session", "rotation with grace, revoke all")


def run(name: str, broken: Broken = NOTHING, *, short: bool = False) -> Explored:
    """Explore one scenario; a broken one up to the first fault. ``short``: some without a crash."""
    begun, site, crashes, programs = scenarios(broken)[name]
    if short and name in LONG:
        crashes = 0

    def start() -> tuple[Users, dict[str, Program]]:
        w = begun.copy()
        return w, {me: program(w, me) for me, program in programs.items()}

    explored = explore(
        start,
        partial(check, site=site),
        partial(final, site=site),
        crashes=crashes,
        unbreakable=("back",),
        first=bool(broken),
    )
    return Explored(*explored, {})


def main() -> int:
    began = time.perf_counter()
    states = endings = missed = 0
    faults: list[str] = []
    for name in scenarios(NOTHING):
        explored = run(name)
        states, endings = states + explored.states, endings + explored.endings
        faults += [f"{fault} [{name}: {way}]" for fault, way in explored.faults.items()]
        print(f"  {name:36}{explored.states:7} states{explored.endings:6} endings", flush=True)
    print(
        f"The protocol: {states} states, {endings} endings, {len(faults)} faults", *faults, sep="\n"
    )
    for broken, (meaning, name) in BREAKS.items():
        found = run(name, frozenset({broken})).faults
        missed += not found
        fault, way = next(iter(found.items()), ("NOT SEEN", ""))
        print(f"  {broken}: {meaning}. {fault} [{name}: {way}]", flush=True)
    print(f"{len(BREAKS) - missed} of {len(BREAKS)} seen, {time.perf_counter() - began:.0f} s")
    return bool(faults or missed)


if __name__ == "__main__":
    sys.exit(main())
