"""G3, G4 and G5 at once: requests in any interleaving, on each store, against a plain model.

The model knows of no versions, records or retries: a session is a dict, a list of its tokens and
two times between which it ends. What a request saw and what it wants are dicts too, and saving is
a merge of three dicts, key by key. Each value may have a time at which it expires.
"""

from __future__ import annotations

import copy
import io
import math
import os
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count
from typing import Any, NamedTuple

import pytest
from flask import Flask, Request
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)
from werkzeug.http import parse_cookie
from werkzeug.test import EnvironBuilder

from flask_gsession import Session, SessionData
from flask_gsession.errors import SessionConflict, SessionEnded
from flask_gsession.events import WriteDropped
from flask_gsession.request.session import lifecycle_of
from flask_gsession.stores import Store, StoreOptions, open_store
from flask_gsession.testing import FakeClock
from flask_gsession.values.merge import MISSING
from tests.harness.marks import long
from tests.values.test_codec import shape

IDLE, STEP, ABSOLUTE = 100, 5, 400  # seconds
SPILL_BYTES = 1000

number = st.integers(-3, 3)
word = st.sampled_from(["", "a", "\ud800", "b"])
small = st.one_of(number, word, st.none(), st.booleans(), st.sampled_from([0.0, -0.0, 2**70]))

#: The kind of value that the application keeps under each key.
KINDS: dict[str, st.SearchStrategy[Any]] = {
    "name": small,
    "cart": st.lists(small, max_size=3),
    "deep": st.fixed_dictionaries({"a": st.lists(small, max_size=2), "b": st.tuples(small)}),
    "hits": number,
    "tags": st.sets(number, max_size=3),
    "log": st.lists(small, max_size=3),
    "prefs": st.dictionaries(word.filter(str.isascii), small, max_size=3),
    "only": number,
    "file": st.sampled_from([b"", b"x", b"x"]),
}
KEYS = sorted(KINDS)


#: The atomic update of each key, and the default that it starts with.
UPDATES: dict[str, tuple[Callable[[Any], Any], Any]] = {
    "cart": (lambda cart: [*cart, 7], []),
    "hits": (lambda hits: hits + 1, 0),
    "tags": (lambda tags: tags ^ {2}, set()),
    "log": (lambda log: [*log, 7], []),
    "only": (lambda only: only + 1, 0),
}


class Kept(NamedTuple):
    """A value, and when it expires."""

    value: Any
    end: float | None = None


def unexpired(data: dict[str, Kept], now: float) -> dict[str, Kept]:
    return {key: kept for key, kept in data.items() if kept.end is None or now < kept.end}


class Conflict(Exception):
    """The merge refuses."""


def merge_counter(base: Any, theirs: Any, mine: Any) -> Any:
    return sum(0 if n is MISSING else n for n in (theirs, mine)) - (0 if base is MISSING else base)


def merge_set(base: Any, theirs: Any, mine: Any) -> Any:
    before = set() if base is MISSING else base
    merged = set() if theirs is MISSING else set(theirs)
    merged |= {item for item in mine if item not in before}
    return merged - {item for item in before if item not in mine}


def merge_append(base: Any, theirs: Any, mine: Any) -> Any:
    before = [] if base is MISSING else base
    if shape(mine[: len(before)]) != shape(before):
        raise Conflict
    return ([] if theirs is MISSING else theirs) + mine[len(before) :]


def merge_dict(base: Any, theirs: Any, mine: Any) -> Any:
    before = {} if base is MISSING else base
    merged = {} if theirs is MISSING else dict(theirs)
    for entry in before.keys() - mine.keys():
        merged.pop(entry, None)
    for entry, value in mine.items():
        if entry not in before or shape(before[entry]) != shape(value):
            merged[entry] = value
    return merged


def refuse(base: Any, theirs: Any, mine: Any) -> Any:
    raise Conflict


MERGES: dict[str, Callable[[Any, Any, Any], Any]] = {
    "hits": merge_counter,
    "tags": merge_set,
    "log": merge_append,
    "prefs": merge_dict,
    "only": refuse,
}
POLICIES = {"hits": "counter", "tags": "set", "log": "append", "prefs": "dict", "only": "reject"}


def differs(one: Any, other: Any) -> bool:
    """Whether two values differ, or their ends do."""
    if one is MISSING or other is MISSING:
        return one is not other
    return shape(one.value) != shape(other.value) or one.end != other.end


def merged(
    base: dict[str, Kept], theirs: dict[str, Kept], mine: dict[str, Kept]
) -> dict[str, Kept]:
    """The values stored after a request that saw `base` and wants `mine` met `theirs`."""
    result = dict(theirs)
    for key in KEYS:
        before, now, wanted = (side.get(key, MISSING) for side in (base, theirs, mine))
        if not differs(before, wanted):
            continue
        if differs(before, now) and key in MERGES and (wanted is not MISSING or key == "only"):
            value = MERGES[key](*(kept and kept.value for kept in (before, now, wanted)))
            was = before.end if before else None
            wanted = Kept(value, now.end if now and wanted.end == was else wanted.end)
        if wanted is MISSING:
            result.pop(key, None)
        else:
            result[key] = wanted
    return copy.deepcopy(result)


class Stored:
    """A session as the model has it."""

    def __init__(self, cookie: str, data: dict[str, Kept], now: float) -> None:
        self.data = data
        self.expired: set[str] = set()  # keys of values that are stored, but have expired
        # The session's tokens, each with the time from which it leads nowhere. The last is its own.
        self.cookies: list[tuple[str, float | None]] = [(cookie, None)]
        self.dead = False
        self.end = now + ABSOLUTE
        self.lives_until = self.ends_by = 0.0
        self.used(now, now)

    def used(self, opened: float, saved: float) -> None:
        """A request that began at `opened` ended at `saved`."""
        self.lives_until = max(self.lives_until, min(opened + IDLE, self.end))
        self.ends_by = max(self.ends_by, min(saved + IDLE + STEP, self.end))

    def leads_here(self, index: int, now: float) -> bool:
        """Whether the session is reached by its token of that number, while it lives."""
        return all(until is None or now < until for _, until in self.cookies[index:])


class Open:
    """A request that has begun."""

    def __init__(self, real: SessionData, now: float, presented: bool) -> None:
        self.real, self.began, self.presented = real, now, presented
        self.session: Stored | None = None
        self.index = 0
        self.saw: dict[str, Kept] = {}
        self.wants: dict[str, Kept] = {}
        self.stored: dict[str, Kept] = {}  # when it last looked at all
        self.attached = math.inf
        # Values that have expired, but may still be stored. Removing one, or its replacement, is no
        # change; but it may be taken for one.
        self.expired: set[str] = set()
        self.grace: float | None = None
        self.came_by: tuple[Stored | None, int] = (None, 0)  # the session and token it began with
        self.ended = self.cleared = self.destroyed = self.took_last = self.took = False
        self.old = False  # its token is not the newest of its session

    def sees(self, session: Stored | None) -> None:
        """It has loaded this session; None for an anonymous one."""
        self.session = session
        self.saw = copy.deepcopy(session.data) if session else {}
        self.wants, self.stored = copy.deepcopy(self.saw), copy.deepcopy(self.saw)
        self.index = len(session.cookies) - 1 if session else 0
        self.grace, self.cleared = None, False
        self.expired = set(session.expired) if session else set()
        self.took_last = False

    def parts(self) -> None:
        """It signs in with an old token: the new session holds only the values that it assigned.

        If it leaves nothing else, and removes these too, it has logged out instead.
        """
        kept = {
            key: kept
            for key, kept in self.wants.items()
            if self.has_changed(key)
            and (key not in self.saw or type(kept.value) not in (list, set, dict))
        }
        emptied = self.wants.keys() <= kept.keys()
        self.sees(None)
        self.wants, self.old, self.cleared = kept, False, emptied

    def expire(self, now: float) -> None:
        before = {*self.saw, *self.wants}
        self.expired |= self.saw.keys() - unexpired(self.saw, now).keys()
        self.saw, self.wants = unexpired(self.saw, now), unexpired(self.wants, now)
        self.stored = unexpired(self.stored, now)
        self.expired |= before - {*self.saw, *self.wants}

    @property
    def void(self) -> bool:
        """Whether it may be taken to have changed something, although it did not."""
        return not self.expired <= self.wants.keys()

    def has_changed(self, key: str) -> bool:
        return differs(self.saw.get(key, MISSING), self.wants.get(key, MISSING))

    @property
    def changed(self) -> bool:
        return any(map(self.has_changed, KEYS))

    def conflicts(self) -> bool:
        """Whether it need not look at the store once more to know that it cannot be merged."""
        try:
            merged(self.saw, self.stored, self.wants)
        except Conflict:
            return True
        return False

    @property
    def writes(self) -> bool:
        empties = (self.cleared or self.took_last) and not self.stored
        return self.changed or empties or self.grace is not None


class Machine(RuleBasedStateMachine):
    """Requests that open, read, change, rotate, end and save in any order."""

    def __init__(self, store: Store, clock: FakeClock) -> None:
        super().__init__()
        self.clock = clock
        self.app = Flask(__name__, static_folder=None)
        self.app.secret_key = "a key for tests"
        ext = Session(
            self.app,
            store=store,
            clock=clock,
            idle_timeout=IDLE,
            absolute_timeout=ABSOLUTE,
            merge_policies=POLICIES,
            spill_bytes=SPILL_BYTES,
        )
        self.dropped: list[WriteDropped] = []
        ext.on(WriteDropped, self.dropped.append)
        self.sessions: list[Stored] = []
        self.requests: list[Open] = []
        self.lengths = count(SPILL_BYTES + 1)
        self.keys: st.SearchStrategy[str] = st.nothing()

    # -- the real thing

    def open_real(self, cookie: str | None) -> SessionData:
        headers = {"Cookie": f"session={cookie}"} if cookie else {}
        request = Request(EnvironBuilder(headers=headers).get_environ())
        real = self.app.session_interface.open_session(self.app, request)
        assert isinstance(real, SessionData)
        return real

    def save_real(self, real: SessionData) -> tuple[int, str | None]:
        """The status, and the new cookie: None for no cookie, empty for one that is deleted."""
        response = self.app.response_class()
        lifecycle_of(real).begin_response(response)  # as Flask, before it saves
        with self.app.test_request_context():
            self.app.session_interface.save_session(self.app, real, response)
        cookies = [parse_cookie(line) for line in response.headers.getlist("Set-Cookie")]
        assert len(cookies) <= 1
        return response.status_code, cookies[0]["session"] if cookies else None

    # -- the model

    @property
    def now(self) -> float:
        return self.clock.now

    def lives(self, session: Stored) -> bool:
        """Whether the session lives; between the two times of its end, the store decides."""
        if not session.dead and self.now >= session.lives_until:
            own, _ = session.cookies[-1]
            session.dead = self.now >= session.ends_by or self.open_real(own).new
        return not session.dead

    def reached(self, session: Stored | None, index: int) -> bool:
        return session is not None and self.lives(session) and session.leads_here(index, self.now)

    def may_look(self, request: Open, key: str) -> bool:
        """Whether the request is guaranteed to find the value that it saw under a key.

        A large value may be gone that another request replaced, or ended the session of.
        """
        if key != "file" or key not in request.wants:
            return True
        session = request.session
        if session is None or not self.reached(session, request.index):
            return session is None
        theirs = session.data.get(key, MISSING)
        return request.has_changed(key) or not differs(request.wants[key], theirs)

    # -- rules

    @initialize(data=st.data())
    def there_is_a_session(self, data: st.DataObject) -> None:
        # Few keys, so that requests meet at them.
        some = st.lists(st.sampled_from(KEYS), min_size=1, max_size=3, unique=True)
        self.keys = st.sampled_from(data.draw(some))
        self.begin(None, 0)
        for key in data.draw(st.sets(self.keys, min_size=1)):
            self.assign(self.requests[0], key, data.draw(KINDS[key]))
        self.end(self.requests[0])
        for _ in range(3):
            self.begin(self.sessions[0], 0)

    def begin(self, session: Stored | None, index: int) -> None:
        cookie = session.cookies[index][0] if session else None
        request = Open(self.open_real(cookie), self.now, cookie is not None)
        found = session if self.reached(session, index) else None
        request.came_by = session, index
        assert request.real.new is (found is None)
        request.sees(found)
        request.old = found is not None and index != request.index
        self.requests.append(request)

    def pick(self, data: st.DataObject) -> Open:
        request: Open = data.draw(st.sampled_from(self.requests))
        return request

    @rule(data=st.data())
    def a_request_begins(self, data: st.DataObject) -> None:
        session = data.draw(st.sampled_from([*self.sessions[-3:], None]))
        index = data.draw(st.integers(0, len(session.cookies) - 1)) if session else 0
        self.begin(session, index)
        if len(self.requests) > 4:
            self.end(self.requests[0])

    @rule(data=st.data())
    def it_looks(self, data: st.DataObject) -> None:
        request, key = self.pick(data), data.draw(self.keys)
        if data.draw(st.booleans()) and self.may_look(request, "file"):
            assert_same(dict(request.real), request.wants)
        assert (key in request.real) is (key in request.wants)
        if key in request.wants:
            value, end = request.wants[key]
            if self.may_look(request, key):
                assert shape(request.real[key]) == shape(value)
            assert request.real.ttl(key) == (end and end - self.now)

    @rule(data=st.data())
    def it_changes_something(self, data: st.DataObject) -> None:
        self.change(data, self.pick(data))

    @rule(data=st.data())
    def some_change_something_and_end(self, data: st.DataObject) -> None:
        racing = data.draw(st.permutations(self.requests))[: data.draw(st.integers(1, 3))]
        for request in racing:
            self.change(data, request)
        for request in racing:
            self.end(request)
        self.another_begins()

    def change(self, data: st.DataObject, request: Open) -> None:
        for key in data.draw(st.lists(self.keys, min_size=1, max_size=2)):
            way = data.draw(st.sampled_from(["inside", "inside", "assign", "delete"]))
            unsure = not self.may_look(request, key)
            if way == "delete" and unsure:
                del request.real[key], request.wants[key]
            elif way == "delete":
                there = request.wants.pop(key, Kept(MISSING))
                assert shape(request.real.pop(key, MISSING)) == shape(there.value)
            elif way == "assign" or unsure or key not in request.wants:
                ttl = data.draw(st.sampled_from([None, None, 6, 25]))
                self.assign(request, key, data.draw(KINDS[key]), ttl)
            else:
                by, grow = data.draw(small), data.draw(st.booleans())
                value, end = request.wants[key]
                request.wants[key] = Kept(changed_inside(value, by, grow), end)
                value = request.real[key]
                after = changed_inside(value, by, grow)
                if after is not value:
                    request.real.set(key, after, ttl=end and end - self.now)

    def assign(self, request: Open, key: str, value: Any, ttl: int | None = None) -> None:
        if key == "file":  # each another one; most are large
            value *= next(self.lengths)
            request.attached = min(request.attached, self.now)
            request.real.attach(key, io.BytesIO(value), ttl=ttl)
        else:
            request.real.set(key, copy.deepcopy(value), ttl=ttl)
        request.wants[key] = Kept(copy.deepcopy(value), ttl and self.now + ttl)

    @rule(data=st.data(), way=st.sampled_from(["update", "take"]))
    def it_does_something_at_once(self, data: st.DataObject, way: str) -> None:
        request = self.pick(data)
        if request.cleared or request.void or request.grace is not None:
            return  # earlier changes are stored first, which other rules cover
        if not self.may_look(request, "file"):
            return
        for key in KEYS:
            request.real.get(key)  # values that it did not read would be the stored ones
        key = data.draw(self.keys)
        if way == "update" and key in UPDATES:
            function, default = UPDATES[key]
            self.at_once(request, lambda: request.real.update_atomic(key, function, default), key)
        else:
            self.at_once(request, lambda: request.real.take(key, MISSING), key, takes=True)

    def at_once(
        self, request: Open, act: Callable[[], Any], key: str, *, takes: bool = False
    ) -> None:
        """A key is taken or updated in the store itself, after pending changes of the same key."""
        session, drops = request.session, len(self.dropped)
        pending = request.has_changed(key)
        looks = pending or not takes or key in request.stored
        if session is None and not request.ended:
            result = done(request.wants, key, takes)
            assert shape(act()) == shape(result)
            return
        if pending and not request.ended and request.conflicts():
            with pytest.raises(SessionConflict):
                act()
            return
        if request.ended or (looks and not self.reached(session, request.index)):
            with pytest.raises(SessionEnded):
                act()
            assert len(self.dropped) - drops == (not request.ended)
            if not request.ended:
                request.sees(None)
                request.ended = True
            return
        assert session is not None
        if pending:
            try:
                session.data = merged(request.saw, session.data, request.wants)
            except Conflict:
                with pytest.raises(SessionConflict):
                    act()
                request.old = request.old or request.index != len(session.cookies) - 1
                request.index, request.stored = len(session.cookies) - 1, dict(session.data)
                return
            request.saw = copy.deepcopy(request.wants)
            if not session.data:  # the pending changes have emptied the session, and ended it
                session.dead = request.destroyed = True
                request.sees(None)
                result = done(request.wants, key, takes)
                assert shape(act()) == shape(result)
                return
        result = MISSING
        if looks:
            result = done(session.data, key, takes)
            request.old = request.old or request.index != len(session.cookies) - 1
            request.index = len(session.cookies) - 1
            request.stored = dict(session.data)
            if pending or result is not MISSING:
                session.used(request.began, self.now)
            request.took_last = takes and result is not MISSING and not session.data
            request.took = request.took or request.took_last
        assert shape(act()) == shape(result)
        for side in (request.saw, request.wants):
            side.pop(key, None)
            if not takes:
                side[key] = copy.deepcopy(session.data[key])

    @rule(data=st.data())
    def it_clears(self, data: st.DataObject) -> None:
        self.clear(self.pick(data))

    def clear(self, request: Open) -> None:
        request.real.clear()
        request.wants.clear()
        request.cleared = True

    @rule(data=st.data(), grace=st.sampled_from([None, 0, 20, 60]))
    def it_rotates(self, data: st.DataObject, grace: float | None) -> None:
        self.rotate(self.pick(data), grace)

    def rotate(self, request: Open, grace: float | None) -> None:
        if request.session and len(request.session.cookies) > 5:
            return  # longer chains of pointers are cut off
        request.real.rotate(grace)
        if request.old and grace == 0:
            request.parts()
        elif request.session is not None and not request.old:
            chosen = 10 if grace is None else grace
            request.grace = chosen if request.grace is None else min(chosen, request.grace)

    @rule(data=st.data())
    def it_logs_out(self, data: st.DataObject) -> None:
        self.log_out(self.pick(data))

    @rule(data=st.data(), grace=st.sampled_from([0, 20]))
    def one_rotates_and_another_logs_out(self, data: st.DataObject, grace: float) -> None:
        rotating, leaving = data.draw(st.permutations(self.requests))[:2]
        self.rotate(rotating, grace)
        self.end(rotating)
        self.log_out(leaving)
        self.another_begins()

    def log_out(self, request: Open) -> None:
        request.real.destroy()
        if request.session is not None and self.reached(request.session, request.index):
            request.session.dead = True
        self.end_presented(request)
        request.sees(None)
        request.ended, request.destroyed = False, True

    def end_presented(self, request: Open) -> None:
        """End the session that the request's token leads to, also if it has one of its own."""
        session, index = request.came_by
        if session is not None and self.reached(session, index):
            session.dead = True

    @rule(data=st.data())
    def it_reloads(self, data: st.DataObject) -> None:
        self.reload(self.pick(data))

    def reload(self, request: Open) -> None:
        request.real.reload()
        came_from, index = request.came_by
        if request.session is None and not request.destroyed and self.reached(came_from, index):
            request.sees(came_from)  # it signed in with an old token, which is undone
            request.old = index != request.index
        elif request.session is None:
            request.sees(None)
        elif self.reached(request.session, request.index):
            request.old = request.old or request.index != len(request.session.cookies) - 1
            request.sees(request.session)
        else:
            request.sees(None)
            request.ended = True

    @rule(data=st.data())
    def it_ends(self, data: st.DataObject) -> None:
        self.end(self.pick(data))
        self.another_begins()

    def another_begins(self) -> None:
        """Keep at least three requests open: on a session that lives, where there is one."""
        while len(self.requests) < 3:
            living = [session for session in self.sessions if self.lives(session)]
            self.begin(living[-1], len(living[-1].cookies) - 1) if living else self.begin(None, 0)

    def end(self, request: Open) -> None:
        """Save the request, and compare the outcome with the model."""
        self.requests.remove(request)
        session, writes = request.session, request.writes
        reached = self.reached(session, request.index)
        drops = len(self.dropped)
        status, cookie = self.save_real(request.real)
        conflict = not request.ended and request.conflicts()
        if request.ended:
            drop = request.changed
        else:
            drop = session is not None and writes and not reached and not conflict
        assert request.void or len(self.dropped) - drops == drop
        if request.ended:
            assert (status, cookie) == (200, None)
        elif session is None:
            self.end_anonymous(request, status, cookie)
        elif conflict:
            assert (status, cookie) == (409, None)
        elif not reached:
            assert (status, cookie) == (200, None)
        elif not writes and cookie == "" and (request.cleared or request.took_last or request.void):
            # It emptied a session whose last values have expired since, so that is its end.
            assert status == 200
            assert not unexpired(session.data, self.now)
            session.dead = True
        elif not writes:
            assert (status, cookie) == (200, None)
            session.used(request.began, self.now)
        else:
            self.end_with_changes(request, session, status, cookie)

    def end_anonymous(self, request: Open, status: int, cookie: str | None) -> None:
        assert status == 200
        if request.wants:
            assert cookie
            assert all(cookie != old for s in self.sessions for old, _ in s.cookies)
            self.sessions.append(Stored(cookie, copy.deepcopy(request.wants), self.now))
        elif request.presented and (request.destroyed or request.cleared):
            assert cookie == ""
            self.end_presented(request)
        else:
            assert cookie is None

    def end_with_changes(
        self, request: Open, session: Stored, status: int, cookie: str | None
    ) -> None:
        rotated_meanwhile = request.index != len(session.cookies) - 1
        # A rotation beside another one is done already; unless the old token must end at once.
        rotates = request.grace == 0 or (request.grace is not None and not rotated_meanwhile)
        if rotates and rotated_meanwhile:  # a sign-in, whose token is an old one by now
            others = session.data.keys() - request.saw.keys() - request.wants.keys()
            unchanged = {key for key in request.wants if not request.has_changed(key)}
            cleared = request.cleared or request.took_last
            request.parts()
            if others and not cleared:
                request.cleared = request.took and cookie == ""  # if it took all of it before
            elif unchanged and not unchanged & session.data.keys() and not request.wants:
                request.cleared = cookie == ""  # unless it has looked at what others removed
            self.end_anonymous(request, status, cookie)
            return
        try:
            data = merged(request.saw, session.data, request.wants)
        except Conflict:
            assert (status, cookie) == (409, None)
            return
        assert status == 200
        nothing_in_sum = not request.changed and not rotates
        # Another request may have taken the value, without having ended, while this one still sees
        # it.
        if not data and (not nothing_in_sum or request.cleared or request.took_last):
            assert cookie == ""
            session.dead = True
            return
        if nothing_in_sum:
            assert cookie is None
            session.used(0, self.now)  # or not: whether it had to be saved is the store's affair
            return
        session.data, session.expired = data, set()
        session.used(request.began, self.now)
        if rotates:
            assert cookie
            old, _ = session.cookies[-1]
            session.cookies[-1] = (old, self.now + (request.grace or 0))
            session.cookies.append((cookie, None))
        else:
            assert cookie is None

    @rule(data=st.data(), by=number)
    def a_counter_is_updated_at_once(self, data: st.DataObject, by: int) -> None:
        session = data.draw(st.sampled_from([*self.sessions, None]))
        index = data.draw(st.integers(0, len(session.cookies) - 1)) if session else 0
        self.begin(session, index)
        request = self.requests[-1]
        value = request.real.update_atomic("hits", lambda hits: hits + by, 0)
        before, end = request.wants.get("hits", Kept(0))
        assert value == before + by
        if request.session is not None:
            request.session.data["hits"] = Kept(value, end)
            request.session.used(self.now, self.now)
            request.sees(request.session)
        else:
            request.wants["hits"] = Kept(value, end)
        self.end(request)

    @rule(seconds=st.sampled_from([1, 6, 19, 20, 50, 99, 104, 105]))
    def time_passes(self, seconds: int) -> None:
        for request in list(self.requests):
            if request.attached + IDLE <= self.now + seconds:
                self.end(request)  # its attached file is not kept longer
        self.another_begins()
        self.clock.advance(seconds)
        for session in self.sessions:
            stored, session.data = session.data, unexpired(session.data, self.now)
            session.expired |= stored.keys() - session.data.keys()
        for request in self.requests:
            request.expire(self.now)

    @invariant()
    def every_token_leads_where_it_should(self) -> None:
        for session in self.sessions:
            lives = self.lives(session)
            for index, (cookie, _) in enumerate(session.cookies):
                real = self.open_real(cookie)
                if lives and session.leads_here(index, self.now):
                    assert_same(dict(real), session.data)
                else:
                    assert real.new
                    assert dict(real) == {}


def done(data: dict[str, Kept], key: str, takes: bool) -> Any:
    """Take or update a key. Returns the old or the new value."""
    there = data.pop(key, Kept(MISSING))
    if takes:
        return there.value
    function, default = UPDATES[key]
    value = function(default if there.value is MISSING else there.value)
    data[key] = Kept(value, there.end)
    return value


def changed_inside(value: Any, by: Any, grow: bool) -> Any:
    """Change `value` in place, or return a changed copy of an immutable one."""
    if type(value) is list:
        if grow or not value:
            value.append(by)
        else:
            value.pop()
    elif type(value) is set:
        value ^= {2 if grow else 3}
    elif type(value) is not dict:
        return value + 1 if type(value) is int else by
    elif type(value.get("a")) is list:
        value["a"].append(by)
    elif grow or not value:
        value["b"] = by
    else:
        value.popitem()
    return value


def assert_same(real: dict[str, Any], model: dict[str, Kept]) -> None:
    assert {k: shape(v) for k, v in real.items()} == {k: shape(v.value) for k, v in model.items()}


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock(float(int(FakeClock().now)))


@pytest.fixture
def store(store_url: str, store_prefix: str, clock: FakeClock) -> Iterator[Store]:
    options = StoreOptions(prefix=store_prefix, clock=clock, timeout=10, pool_max=10)
    opened, _ = open_store(store_url, options)
    yield opened
    opened.close()


@pytest.mark.parametrize("effort", long([1, 4], {4}))
def test_interleaved_requests_equal_the_model(
    store: Store, store_url: str, clock: FakeClock, effort: int
) -> None:
    examples = effort * {"memory": 100, "mongodb": 15}.get(store_url.partition(":")[0], 30)
    run_state_machine_as_test(
        lambda: Machine(store, clock),
        settings=settings(
            max_examples=int(os.environ.get("EXAMPLES", examples)),
            stateful_step_count=25,
            # `EXAMPLES=1000` looks for new ones, and shortens them, in up to 5 minutes.
            derandomize="EXAMPLES" not in os.environ,
            phases=[
                phase for phase in Phase if phase is not Phase.shrink or "EXAMPLES" in os.environ
            ],
        ),
    )


class Script(Machine):
    """The model with steps that a search found, written down: two requests of one session."""

    def __init__(self, store: Store, clock: FakeClock, **values: Any) -> None:
        super().__init__(store, clock)
        self.begin(None, 0)
        for key, value in values.items():
            self.assign(self.requests[0], key, value)
        self.end(self.requests[0])
        self.begin(self.sessions[0], 0)
        self.begin(self.sessions[0], 0)

    def begin_with_old_token(self) -> Open:
        """A request that comes while the token is in its grace period, which another one began."""
        rotating = self.requests[0]
        self.rotate(rotating, 60)
        self.end(rotating)
        self.begin(self.sessions[0], 0)
        return self.requests[-1]

    def take(self, request: Open, key: str) -> None:
        for each in KEYS:
            request.real.get(each)
        self.at_once(request, lambda: request.real.take(key, MISSING), key, takes=True)

    def update(self, request: Open, key: str) -> None:
        function, default = UPDATES[key]
        act = partial(request.real.update_atomic, key, function, default)
        self.at_once(request, act, key)


def test_a_session_ends_when_two_requests_have_taken_all_of_it(
    store: Store, clock: FakeClock
) -> None:
    """Also where the one that takes the last value still sees the other, which it looked at."""
    script = Script(store, clock, cart=[], prefs={})
    first, second = script.requests
    script.take(first, "prefs")
    script.take(second, "cart")
    script.end(second)
    assert script.sessions[0].dead
    script.end(first)
    script.every_token_leads_where_it_should()


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_a_request_that_has_taken_nothing_ends_nothing(
    store: Store, clock: FakeClock, order: tuple[int, int]
) -> None:
    """The other one has taken the only value, so its end is the session's."""
    script = Script(store, clock, name="mug")
    requests = list(script.requests)
    for request in requests:
        script.take(request, "name")
    for number in order:
        script.end(requests[number])
    assert script.sessions[0].dead
    script.every_token_leads_where_it_should()


def test_a_reload_undoes_a_sign_in_with_an_old_token(store: Store, clock: FakeClock) -> None:
    """The reload discards unsaved changes, and loads the session of the token again."""
    script = Script(store, clock, cart=[])
    _, other = script.requests
    signing_in = script.begin_with_old_token()
    script.update(other, "cart")
    script.rotate(signing_in, 0)
    script.reload(signing_in)
    script.update(signing_in, "cart")
    for request in list(script.requests):
        script.end(request)
    assert script.sessions[0].data["cart"].value == [7, 7]
    script.every_token_leads_where_it_should()


@pytest.mark.parametrize("order", ["clear first", "rotate first", "rotated meanwhile"])
def test_a_logout_with_an_old_token_ends_the_session(
    store: Store, clock: FakeClock, order: str
) -> None:
    """Also if another request has stored a key after the one that logs out looked."""
    script = Script(store, clock, cart=[])
    _, earlier = script.requests
    if order == "rotated meanwhile":
        script.rotate(earlier, 0)
    later = script.begin_with_old_token()
    leaving = earlier if order == "rotated meanwhile" else later
    script.begin(script.sessions[0], 1)
    writing = script.requests[-1]
    if order == "rotate first":
        script.rotate(leaving, 0)
    script.assign(writing, "hits", 1)
    script.end(writing)
    script.clear(leaving)
    if order == "clear first":
        script.rotate(leaving, 0)
    script.end(leaving)
    assert script.sessions[0].dead
    script.every_token_leads_where_it_should()


def test_a_sign_in_with_an_old_token_ends_nothing_that_was_filled_again(
    store: Store, clock: FakeClock
) -> None:
    """The request has taken the last value, but also stored another one since."""
    script = Script(store, clock, cart=[])
    signing_in = script.begin_with_old_token()
    script.take(signing_in, "cart")
    script.update(signing_in, "hits")
    script.rotate(signing_in, 0)
    script.end(signing_in)
    assert not script.sessions[0].dead
    script.every_token_leads_where_it_should()
