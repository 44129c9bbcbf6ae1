"""Large values: in a place of their own, loaded when they are read, gone with their session.

What can come between the steps of a save (write the large value, save the record, let the replaced
one go), and what is stored then.

==========================================  ==============================================
the save is refused, or the session ended   what was written for it goes at once
the process dies, or the outcome is open    what was written, or replaced, expires
A replaces it while B still reads           B has the earlier one for the grace
A replaces it, and B does                   the later record's; the other's goes
A replaces it, the grace is over, B reads   B gets what is stored by now
A ends the session while B reads            absent to B
A ends the session while B writes           what B wrote goes at once
A renews while B saves                      both are kept for as long as the session
A rotates                                   the same place, under the new token
==========================================  ==============================================
"""

from __future__ import annotations

import hashlib
import io
import tracemalloc
from collections.abc import Callable
from threading import Thread
from typing import Any

import pytest
from flask import Response, copy_current_request_context
from marshmallow import ValidationError, fields

from flask_gsession.errors import (
    SessionConflict,
    SessionTooLarge,
    SettingError,
    StoreUnavailable,
    ValueLost,
)
from flask_gsession.events import LargeValueLost, SessionDestroyed, WriteDropped
from flask_gsession.request.large import SessionLargeValues
from flask_gsession.stores import Store, StoreOptions
from flask_gsession.stores.memory import MemoryStore
from flask_gsession.testing import FakeClock
from flask_gsession.typed import SessionKey
from flask_gsession.values.large_values import ValueReader
from tests.harness.apps import Inside, InsideRedis, Site, SiteMaker, Visitor

LIMIT = 16 * 1024
FRAME = 256 * 1024
ROWS = [{"sku": f"A-{number:05}", "price": 1999} for number in range(2000)]
OTHER_ROWS = [*ROWS, {"sku": "new", "price": 1}]
PHOTO = bytes(range(256)) * 4000  # four frames
NOTES = SessionKey("notes", fields.List(fields.Str()), merge="append")


def put(**values: Any) -> Callable[[Any], None]:
    return lambda session: session.update(values)


def get(key: str = "rows") -> Callable[[Any], Any]:
    return lambda session: session.get(key)


def with_rows(site: Site, **others: Any) -> Visitor:
    """A visitor whose session holds one large value, and small ones."""
    visitor = site.visitor()
    visitor.run(put(rows=ROWS, user="ada", **others))
    return visitor


def blob_of(site: Site) -> str:
    """The name of the only large value."""
    (name,) = site.inside.blobs()
    return name


def left(inside: Inside, name: str) -> int:
    """For how many milliseconds the server of a Redis keeps a large value."""
    assert isinstance(inside, InsideRedis)
    (key,) = inside.client.scan_iter(f"*{name}*", count=1000)
    return int(inside.client.pttl(key))


# A place of its own ----------------------------------------------------------------------------


def test_a_large_value_is_stored_beside_the_session_and_comes_back(site: Site) -> None:
    values: dict[str, Any] = {
        "list": ROWS,
        "bytes": PHOTO,
        "str": "é" * LIMIT,
        "tuple": (1, [2] * LIMIT),
        "int": 7 << 200_000,
        "small": [1],
    }
    visitor = site.visitor()
    visitor.run(put(**values))
    assert len(site.inside.blobs()) == 5
    (record,) = site.stored().values()
    assert len(record) < 2500
    assert visitor.run(lambda session: session.copy()) == values
    assert visitor.run(lambda session: {key: session[key] for key in session}) == values
    assert visitor.run(lambda session: session.size) > sum(map(len, (PHOTO, values["str"])))


def test_the_limit_is_exact(make_site: SiteMaker) -> None:
    site = make_site(spill_bytes=1000)
    visitor = site.visitor()
    visitor.run(put(at="x" * 997, beyond="y" * 998))
    assert [len(frame) for (frame,) in site.inside.blobs().values()] == [16 + 1001]
    assert visitor.run(lambda s: (len(s["at"]), len(s["beyond"]))) == (997, 998)


def test_spilling_can_be_turned_off(make_site: SiteMaker) -> None:
    site = make_site(spill_bytes=None)
    with_rows(site)
    assert site.inside.blobs() == {}
    (record,) = site.stored().values()
    assert b"A-01999" in record


def test_a_large_value_is_loaded_only_when_it_is_read(site: Site) -> None:
    visitor = with_rows(site, photo=PHOTO)
    for look in (
        get("user"),
        list,
        len,
        lambda session: ("rows" in session, session.size, session.ttl("rows")),
        lambda session: list(session.keys()),
    ):
        with site.counted() as count:
            visitor.run(look)
        assert (count.calls, count.trips) == (["load"], 1)
    with site.counted() as count:
        assert visitor.run(lambda session: (session["rows"], session["rows"]))[0] == ROWS
    assert count.calls == ["load", "read_frame"]
    with site.counted() as count:
        assert visitor.run(get("photo")) == PHOTO
    assert count.calls == ["load"] + ["read_frame"] * 4
    with site.counted() as count:
        visitor.run(put(user="eve"))
    assert count.calls == ["load", "save"]


def test_nested_changes_are_noticed_and_the_old_value_stays_for_a_while(
    site: Site, clock: FakeClock
) -> None:
    visitor = with_rows(site)
    before = blob_of(site)
    with site.counted() as count:
        visitor.run(lambda session: session["rows"].append(OTHER_ROWS[-1]))
    steps = ["load", "read_frame", "write_frame", "save", "discard_blobs"]
    assert count.calls == steps
    assert visitor.run(get()) == OTHER_ROWS
    if isinstance(site.inside, InsideRedis):
        assert 0 < left(site.inside, before) <= 60_000
        return
    assert site.store.blobs.read_frame(before, 0, FRAME) is not None
    clock.advance(60)
    assert site.store.blobs.read_frame(before, 0, FRAME) is None
    assert visitor.run(get()) == OTHER_ROWS


def test_equal_values_are_not_written_again(site: Site) -> None:
    visitor = with_rows(site, photo=PHOTO)

    def again(session: Any) -> None:
        session["rows"].append(1)
        session["rows"].pop()
        session["photo"] = bytes(bytearray(PHOTO))
        session["user"] = "ada"
        session.update_atomic("rows", lambda rows: list(rows))
        assert not session.modified

    with site.counted() as count:
        visitor.run(again)
    assert set(count.calls) == {"load", "read_frame"}

    def add(session: Any) -> None:  # an unchanged one goes with the save of another
        session["rows"].sort(key=str)
        session["n"] = 1

    with site.counted() as count:
        visitor.run(add)
    assert count.calls == ["load", "read_frame", "save"]
    assert visitor.run(lambda session: session.copy())["rows"] == ROWS


def test_a_second_save_of_one_request_writes_only_changes(site: Site) -> None:
    visitor = with_rows(site)

    def work(session: Any) -> None:
        session["rows"].append("once")
        session.update_atomic("n", lambda n: n + 1, 0)
        with session.transaction():
            session["m"] = 1
        session["rows"].append("twice")

    with site.counted() as count:
        visitor.run(work)
    assert count.calls.count("write_frame") == 2
    assert visitor.run(get()) == [*ROWS, "once", "twice"]


# Its end ---------------------------------------------------------------------------------------


def pointed_at(visitor: Visitor) -> Visitor:
    """A tab whose token was rotated away."""
    tab = visitor.another_tab()
    visitor.run(lambda session: session.rotate())
    return tab


ENDS: dict[str, Callable[[Any], object]] = {
    "a logout": lambda session: session.destroy(),
    "a logout after a read": lambda session: (session["rows"], session.destroy()),
    "a logout with a change": lambda session: (session["rows"].pop(), session.destroy()),
    "clear": lambda session: session.clear(),
    "clear after a large value": lambda session: (put(photo=PHOTO)(session), session.clear()),
}


def test_a_large_value_ends_with_its_session(site: Site) -> None:
    for what, end in ENDS.items():
        visitor = with_rows(site)
        visitor.run(end)
        assert site.inside.blobs() == {}, what
        assert not site.stored(), what
    visitor = with_rows(site)
    pointed_at(visitor).run(ENDS["a logout"])
    assert site.inside.blobs() == {}


def test_a_logout_costs_one_trip_more_and_only_with_large_values(site: Site) -> None:
    with_rows(site).run(ENDS["a logout"])
    visitor = site.visitor()
    for values, calls in (({"n": 1}, ["delete"]), ({"n": ROWS}, ["delete", "discard_blobs"])):
        visitor.run(put(**values))
        with site.counted() as count:
            visitor.run(ENDS["a logout"])
        assert count.calls == calls


def test_a_key_that_goes_lets_its_value_go(site: Site, clock: FakeClock) -> None:
    visitor = with_rows(site)
    visitor.run(lambda session: session.set("soon", ROWS[:1000], ttl=30))
    visitor.run(lambda session: session.set("taken", ROWS[:900]))
    taken = visitor.run(lambda session: session.take("taken"))
    assert taken == ROWS[:900]
    visitor.run(lambda session: session.pop("rows"))
    clock.advance(31)
    visitor.run(put(user="eve"))
    if isinstance(site.inside, InsideRedis):
        assert all(0 < left(site.inside, name) <= 60_000 for name in site.inside.blobs())
    else:
        clock.advance(60)
        names = site.inside.blobs()
        assert [name for name in names if site.store.blobs.read_frame(name, 0, FRAME)] == []


def test_a_large_value_is_kept_as_long_as_its_session(
    make_site: SiteMaker, clock: FakeClock
) -> None:
    site = make_site(idle_timeout=1000, renew_interval=50)
    visitor = with_rows(site)
    for look in (list, put(n=1), lambda session: session.rotate(), list):
        clock.advance(900)
        visitor.run(look)
    clock.advance(999)
    assert visitor.run(get()) == ROWS
    name = blob_of(site)
    if isinstance(site.inside, InsideRedis):
        assert left(site.inside, name) > 1_000_000
    clock.advance(1200)
    assert visitor.run(list) == []
    if not isinstance(site.inside, InsideRedis):
        assert site.store.blobs.read_frame(name, 0, FRAME) is None


@pytest.mark.parametrize("order", ["before", "after"])
def test_a_longer_life_of_the_session_is_one_of_its_values(
    site: Site, clock: FakeClock, order: str
) -> None:
    def attach(session: Any) -> None:
        session.attach("photo", io.BytesIO(PHOTO))

    def stay(session: Any) -> None:
        session.permanent = True

    visitor = site.visitor()
    steps = [attach, stay] if order == "before" else [stay, attach]
    visitor.run(lambda session: [step(session) for step in steps])
    if isinstance(site.inside, InsideRedis):
        assert left(site.inside, blob_of(site)) > 30 * 86_400_000
        return
    clock.advance(30 * 86400)
    assert visitor.run(get("photo")) == PHOTO


def test_a_slow_request_keeps_its_written_values(site: Site, clock: FakeClock) -> None:
    def slow(session: Any) -> None:
        session.attach("photo", io.BytesIO(PHOTO))
        clock.advance(1800)

    visitor = site.visitor()
    visitor.run(slow)
    clock.advance(7199)
    assert visitor.run(get("photo")) == PHOTO


def test_slow_writing_keeps_the_first_frames(site: Site, clock: FakeClock) -> None:
    visitor = site.visitor()
    site.store.after("write_frame", lambda: clock.advance(100))
    visitor.run(put(rows=ROWS, photo=PHOTO))
    end = visitor.run(lambda session: session.expires_at.timestamp())
    clock.advance(end - clock() - 1)
    assert visitor.run(lambda s: (s.get("rows"), s.get("photo"))) == (ROWS, PHOTO)


def test_a_renewal_that_meets_a_save_keeps_both(site: Site, clock: FakeClock) -> None:
    visitor = with_rows(site)
    tab = visitor.another_tab()
    clock.advance(3600)
    site.store.before("save", lambda: tab.run(list))
    visitor.run(put(photo=PHOTO))
    clock.advance(7190)
    assert visitor.run(lambda s: (s["rows"], s["photo"])) == (ROWS, PHOTO)


def test_expired_ones_are_swept(site: Site, clock: FakeClock) -> None:
    upkeep = site.store.upkeep
    if upkeep is None or site.url.startswith(("redis", "mongodb")):  # which do it themselves
        return
    with_rows(site, photo=PHOTO)
    clock.advance(3 * 3600)
    while upkeep.tidy(limit=10).cursor:
        pass
    assert (site.inside.blobs(), site.stored()) == ({}, {})


# Saves that do not happen ----------------------------------------------------------------------


def test_values_written_by_a_refused_save_are_removed_at_once(make_site: SiteMaker) -> None:
    site = make_site(merge_policies={"strict": "reject"}, max_value_bytes=500_000)
    visitor = with_rows(site, strict=0)
    tab = visitor.another_tab()
    name = blob_of(site)
    for refuse in (
        lambda session: (session.attach("file", io.BytesIO(PHOTO[:300_000])), put(n=len)(session)),
        lambda session: put(photo=PHOTO, rows=OTHER_ROWS)(session),
        lambda session: (
            session["strict"],
            put(rows=OTHER_ROWS, strict=1)(session),
            tab.run(lambda other: put(strict=other["strict"] + 2)(other)),
        ),
    ):
        assert visitor.ask(refuse).status_code in (409, 500)
        assert blob_of(site) == name
    assert visitor.run(get()) == ROWS


def test_a_request_that_attaches_and_forgets(site: Site) -> None:
    visitor = with_rows(site)
    name = blob_of(site)

    def change_its_mind(session: Any) -> None:
        session.attach("photo", io.BytesIO(PHOTO))
        session.attach("photo", io.BytesIO(PHOTO[1:]))
        del session["photo"]

    visitor.run(change_its_mind)
    site.visitor().run(change_its_mind)  # and no session
    assert blob_of(site) == name


def test_a_session_that_ends_meanwhile(site: Site) -> None:
    visitor = with_rows(site)
    tab = visitor.another_tab()
    site.before_a_write(lambda: tab.run(ENDS["a logout"]))
    visitor.run(put(photo=PHOTO))
    assert (site.inside.blobs(), site.stored()) == ({}, {})
    assert len(site.happened(WriteDropped)) == 1


def test_a_transaction_that_is_rolled_back(site: Site) -> None:
    visitor = with_rows(site)
    name = blob_of(site)

    def halfway(session: Any) -> None:
        session["rows"].append(1)
        session.attach("photo", io.BytesIO(PHOTO))
        raise RuntimeError

    def fail(session: Any) -> None:
        with pytest.raises(RuntimeError):
            session.transaction().run(halfway)
        assert session["rows"] == ROWS

    visitor.run(fail)
    assert blob_of(site) == name
    runs: list[int] = []

    def work(session: Any) -> None:
        session["rows"].append(len(runs))
        session.attach("photo", io.BytesIO(PHOTO))
        runs.append(1)
        if len(runs) == 1:
            visitor.another_tab().run(put(n=1))

    visitor.run(lambda session: session.transaction().run(work))
    visitor.run(lambda session: session.rotate(grace=0))
    assert visitor.run(lambda session: session.copy()) == {
        "rows": [*ROWS, 1],
        "user": "ada",
        "n": 1,
        "photo": PHOTO,
    }


def test_an_outage_at_each_step(site: Site) -> None:
    def down() -> None:
        raise StoreUnavailable("drill")

    visitor = with_rows(site)
    for step in ("write_frame", "save", "discard_blobs"):
        for hook in (site.store.before, site.store.after):
            hook(step, down)
            status = 200 if step == "discard_blobs" else 503
            change = put(rows=[*ROWS, step, hook.__name__])
            assert visitor.ask(change).status_code == status, (step, hook)
            found = visitor.run(get())  # whichever value is stored, it can be read
            assert found in (ROWS, *([*ROWS, s, h] for s in STEPS for h in ("before", "after")))
    for step in ("read_frame", "renew_blobs"):
        site.clock.advance(100)
        site.store.before(step, down)
        status = 503 if step == "read_frame" else 200
        assert visitor.ask(get() if status == 503 else list).status_code == status
    assert visitor.run(lambda session: len(session["rows"])) > len(ROWS)
    assert site.happened(LargeValueLost) == []


STEPS = ("write_frame", "save", "discard_blobs")


class Interrupt(BaseException):
    """As gevent's Timeout, or the SystemExit of a worker that took too long."""


@pytest.mark.parametrize("kind", [StoreUnavailable, Interrupt])
def test_a_save_without_an_answer_keeps_the_values_it_may_refer_to(
    site: Site, kind: type[BaseException]
) -> None:
    def lost() -> None:
        raise kind("drill")

    def update(session: Any) -> None:
        site.store.after("save", lost)
        with pytest.raises(kind):
            session.update_atomic("rows", lambda rows: [*rows, "one"])
        if kind is StoreUnavailable:
            session.reload()
            assert session["rows"] == [*ROWS, "one"]

    visitor = with_rows(site)
    visitor.run(update)
    assert visitor.run(get()) == [*ROWS, "one"]
    site.store.after("save", lost)
    if kind is StoreUnavailable:
        assert visitor.ask(put(rows=[*ROWS, "two"])).status_code == 503
    else:
        with pytest.raises(Interrupt):
            visitor.ask(put(rows=[*ROWS, "two"]))
    assert visitor.run(get()) == [*ROWS, "two"]
    assert site.happened(LargeValueLost) == []


def test_values_in_doubt_are_removed_once_the_outcome_is_known(site: Site) -> None:
    def down() -> None:
        raise StoreUnavailable("drill")

    def update(session: Any) -> None:
        site.store.before("save", down)
        with pytest.raises(StoreUnavailable):
            session.update_atomic("rows", lambda rows: [*rows, "one"])
        session.reload()
        session["rows"] = OTHER_ROWS

    visitor = with_rows(site)
    visitor.run(update)
    assert len(site.inside.blobs()) == 2  # the replaced value, for a while, and the current one
    assert visitor.run(get()) == OTHER_ROWS


# Races -----------------------------------------------------------------------------------------


def test_a_running_request_reads_the_value_it_loaded(site: Site) -> None:
    visitor = with_rows(site)
    tab = visitor.another_tab()

    def read(session: Any) -> Any:
        assert session["user"] == "ada"
        tab.run(put(rows=OTHER_ROWS))
        return session["rows"]

    assert visitor.run(read) == ROWS
    assert visitor.run(get()) == OTHER_ROWS


def test_a_request_after_the_grace_reads_the_stored_value(site: Site) -> None:
    visitor = with_rows(site)
    tab = visitor.another_tab()

    def read(session: Any, change: Callable[[Any], object]) -> Any:
        assert session["user"] == "ada"
        before = set(site.inside.blobs())
        tab.run(change)
        for name in before:
            site.inside.spoil(name, None)
        found = session.get("rows")
        session["n"] = 1
        return found

    assert visitor.run(lambda session: read(session, put(rows=OTHER_ROWS))) == OTHER_ROWS
    assert visitor.run(lambda session: read(session, put(rows="small"))) == "small"
    assert visitor.run(get()) == "small"
    visitor.run(put(rows=ROWS))
    assert visitor.run(lambda session: read(session, lambda other: other.pop("rows"))) is None
    assert visitor.run(lambda session: session.copy()) == {"user": "ada", "n": 1}
    assert site.happened(LargeValueLost) == []


def test_a_reader_whose_session_ended(site: Site) -> None:
    visitor = with_rows(site)
    tab = visitor.another_tab()

    def read(session: Any) -> Any:
        assert session["user"] == "ada"
        tab.run(ENDS["a logout"])
        return session.get("rows")

    assert visitor.run(read) is None
    assert site.happened(LargeValueLost) == []
    assert len(site.happened(SessionDestroyed)) == 1


def test_the_later_of_two_writers_wins_and_nothing_else_stays(site: Site, clock: FakeClock) -> None:
    visitor = with_rows(site)
    tab = visitor.another_tab()
    site.before_a_write(lambda: tab.run(put(rows=[*ROWS, "theirs"], theirs=PHOTO)))
    visitor.run(put(rows=[*ROWS, "mine"]))
    assert visitor.run(get()) == [*ROWS, "mine"]
    assert visitor.run(get("theirs")) == PHOTO
    if not isinstance(site.inside, InsideRedis):
        clock.advance(60)
        kept = [n for n in site.inside.blobs() if site.store.blobs.read_frame(n, 0, FRAME + 16)]
        assert len(kept) == 2


@pytest.mark.parametrize("start", [[], ["x" * 50] * 1000], ids=["small", "large"])
def test_a_merge_works_on_the_values(make_site: SiteMaker, start: list[str]) -> None:
    site = make_site(merge_policies={"log": "append"})
    visitor = site.visitor()
    visitor.run(put(log=start, user="ada"))
    visitor.run(lambda session: NOTES.set(start))
    tab = visitor.another_tab()
    mine, theirs = ["m" * 50] * 500, ["t" * 50] * 500

    def add(what: list[str]) -> Callable[[Any], None]:
        def change(session: Any) -> None:
            session["log"].extend(what)
            NOTES.set([*NOTES.get(), *what])

        return change

    site.before_a_write(lambda: tab.run(add(theirs)))
    visitor.run(add(mine))
    both = [*start, *theirs, *mine]
    assert visitor.run(lambda session: (session["log"], NOTES.get())) == (both, both)


def test_a_merge_whose_base_is_lost_is_a_conflict(make_site: SiteMaker) -> None:
    site = make_site(merge_policies={"rows": "append"})
    visitor = with_rows(site)
    tab = visitor.another_tab()
    before = blob_of(site)

    def meanwhile() -> None:
        tab.run(lambda session: session["rows"].append("theirs"))
        site.inside.spoil(before, None)

    site.before_a_write(meanwhile)
    assert visitor.ask(lambda session: session["rows"].append("mine")).status_code == 409
    assert visitor.run(get()) == [*ROWS, "theirs"]


def test_atomic_updates_and_typed_keys_work_on_the_values(site: Site) -> None:
    visitor = with_rows(site)

    def grow(session: Any) -> int:
        rows = session.update_atomic("rows", lambda rows: [*rows, "more"])
        assert NOTES.set(["x" * 50] * 1000) == NOTES.get()
        return len(rows)

    assert visitor.run(grow) == 2001
    with site.counted() as count:
        found = visitor.run(lambda session: (NOTES.get(), NOTES.get(), session["rows"][-1]))
    assert found == (["x" * 50] * 1000, ["x" * 50] * 1000, "more")
    assert count.calls == ["load", "read_frame", "read_frame"]

    def meet(session: Any) -> int:
        assert NOTES.get()
        visitor.another_tab().run(put(notes=["other"]))
        session["n"] = 1
        session.modified = True
        session.update_atomic("m", lambda m: m, 1)
        return len(NOTES.get())

    assert visitor.run(meet) == 1000  # the value that it read stays


# Lost values -----------------------------------------------------------------------------------


def missing(site: Site, name: str) -> None:
    site.inside.spoil(name, None)


def truncated(site: Site, name: str) -> None:
    site.inside.spoil(name, site.inside.blobs()[name][0][:-1])


def emptied(site: Site, name: str) -> None:
    site.inside.spoil(name, site.inside.blobs()[name][0][:17])


def altered(site: Site, name: str) -> None:
    frame = bytearray(site.inside.blobs()[name][0])
    frame[-1] ^= 1
    site.inside.spoil(name, bytes(frame))


def exchanged(site: Site, name: str) -> None:
    """Another session's value, of the same length."""
    eve = site.visitor()
    eve.run(put(rows=[*ROWS[:-1], {"sku": "A-EVIL0", "price": 1999}]))
    (other,) = set(site.inside.blobs()) - {name}
    site.inside.spoil(name, site.inside.blobs()[other][0])


SPOILS = {
    missing: "missing",
    truncated: "truncated",
    emptied: "truncated",
    altered: "altered",
    exchanged: "altered",
}


@pytest.mark.parametrize("keys", [None, [b"k" * 32]], ids=["plain", "sealed"])
def test_a_lost_value_is_absent_and_the_others_stay(
    make_site: SiteMaker, keys: list[bytes] | None, caplog: pytest.LogCaptureFixture
) -> None:
    site = make_site(encryption_keys=keys)
    for number, (spoil, reason) in enumerate(SPOILS.items()):
        caplog.clear()
        visitor = with_rows(site)
        spoil(site, blob_of(site))
        found = visitor.run(lambda session: (session.get("rows"), "rows" in session, list(session)))
        assert found == (None, False, ["user"]), spoil
        event = site.happened(LargeValueLost)[number]
        handle = visitor.run(lambda session: session.handle)
        assert event == LargeValueLost("rows", reason, handle)
        assert f"the large value under 'rows' is lost: {reason}" in caplog.text
        assert "A-0" not in caplog.text
        assert visitor.run(dict) == {"user": "ada"}
        visitor.run(put(rows=ROWS))
        assert visitor.run(dict) == {"user": "ada", "rows": ROWS}
        assert len(site.happened(LargeValueLost)) == number + 1
        visitor.run(ENDS["a logout"])
        for name in site.inside.blobs():  # which nothing refers to
            site.inside.spoil(name, None)


LOOKS: dict[str, tuple[Callable[[Any], Any], Any]] = {
    "items": (lambda session: dict(session.items()), {"user": "ada"}),
    "values": (lambda session: list(session.values()), ["ada"]),
    "copy": (lambda session: session.copy(), {"user": "ada"}),
    "or": (lambda session: session | {"n": 1}, {"user": "ada", "n": 1}),
    "equal": (lambda session: session == {"user": "ada"}, True),
    "pop": (lambda session: session.pop("rows", "absent"), "absent"),
    "take": (lambda session: session.take("rows", "absent"), "absent"),
    "setdefault": (lambda session: session.setdefault("rows", "new"), "new"),
    "update_atomic": (lambda session: session.update_atomic("rows", len, []), 0),
    "typed": (lambda session: SessionKey("rows", fields.List(fields.Raw())).get(["no"]), ["no"]),
}


@pytest.mark.parametrize("meanwhile", ["replaced", "removed", "nothing"])
def test_another_thread_sets_a_value_that_was_found_lost(
    site: Site, meanwhile: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It sets the value after the look at the store, or after the second look at the value."""
    visitor = with_rows(site)

    def view(session: Any) -> Any:
        def set_value() -> None:
            thread = Thread(target=copy_current_request_context(lambda: put(rows="mine")(session)))
            thread.start()
            thread.join()

        def stored_now(large: Any, key: str) -> bytes | None:
            newer = find(large, key)
            set_value()
            return newer

        def lost(large: Any, key: str, *details: Any) -> None:
            if key in large._lost_once:
                set_value()
            handle(large, key, *details)

        session["other"] = 1
        missing(site, blob_of(site))
        tab = visitor.another_tab()
        if meanwhile == "nothing":
            monkeypatch.setattr(SessionLargeValues, "lost", lost)
        else:
            change = put(rows="new") if meanwhile == "replaced" else lambda of: of.remove("rows")
            tab.run(change)
            monkeypatch.setattr(SessionLargeValues, "_stored_now", stored_now)
        return session.get("rows")

    find, handle = SessionLargeValues._stored_now, SessionLargeValues.lost
    assert visitor.run(view) == (None if meanwhile == "nothing" else "mine")
    assert visitor.run(get()) == "mine"


def test_every_look_at_a_lost_value(site: Site) -> None:
    for number, (look, (act, expected)) in enumerate(LOOKS.items()):
        visitor = with_rows(site)
        missing(site, blob_of(site))
        assert visitor.run(act) == expected, look
        assert len(site.happened(LargeValueLost)) == number + 1, look
        assert visitor.run(get("user")) == "ada"
        assert visitor.run(lambda session: isinstance(session.get("rows"), list)) is False


def test_a_value_that_another_worker_can_read_is_left_alone(make_site: SiteMaker) -> None:
    old, new = [b"o" * 32], [b"n" * 32]
    before = make_site(encryption_keys=old)
    between, after = (
        make_site(encryption_keys=keys, store=before.store) for keys in ([*new, *old], new)
    )
    visitor = with_rows(before)
    assert b"A-01999" not in b"".join(*before.inside.blobs().values())
    tab = between.visitor(visitor.cookie)
    assert tab.run(lambda session: (put(user="eve")(session), session["rows"])[1]) == ROWS
    tab = after.visitor(visitor.cookie)  # it can open the record, and not the value
    assert tab.run(get()) is None
    assert [event.reason for event in after.happened(LargeValueLost)] == ["unknown encryption key"]
    tab.run(put(n=1))
    assert tab.ask(lambda session: session.update_atomic("rows", len, [])).status_code == 409
    tab = between.visitor(visitor.cookie)
    assert tab.run(dict) == {"user": "eve", "rows": ROWS, "n": 1}


def test_values_from_before_the_encryption(make_site: SiteMaker) -> None:
    key = [b"k" * 32]
    before = make_site()
    turning, after = (
        make_site(encryption_keys=keys, store=before.store) for keys in ([*key, "plain"], key)
    )
    visitor = with_rows(before)
    tab = turning.visitor(visitor.cookie)
    assert tab.run(lambda session: (put(user="eve")(session), session["rows"])[1]) == ROWS
    tab = after.visitor(visitor.cookie)
    assert (tab.run(get("user")), tab.run(get())) == ("eve", None)
    assert after.happened(LargeValueLost)[-1].reason == "not encrypted"
    tab = turning.visitor(visitor.cookie)
    tab.run(lambda session: session["rows"].pop())
    assert after.visitor(visitor.cookie).run(get()) == ROWS[:-1]


# Streams ---------------------------------------------------------------------------------------


class Trickle(io.RawIOBase):
    """A file that gives a little at a time, as a socket does."""

    def __init__(self, content: bytes, fails: bool = False) -> None:
        self._file = io.BytesIO(content)
        self._fails = fails

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        part = self._file.read(min(size, 70_000))
        if self._fails and not part:
            raise ConnectionResetError("the client went away")
        return part


SIZES = [0, 1, LIMIT, LIMIT + 1, FRAME - 1, FRAME, FRAME + 1, 3 * FRAME, 3 * FRAME + 7]


def test_a_file_of_any_size_goes_in_and_comes_out(site: Site) -> None:
    visitor = site.visitor()
    for size in SIZES:
        content = (PHOTO * 2)[:size]
        assert visitor.run(lambda s, c=content: s.attach("photo", Trickle(c))) == size
        assert visitor.run(lambda session: session.open("photo").read()) == content
        assert visitor.run(get("photo")) == content
        length, digest = visitor.run(lambda s: (s.open("photo").length, s.open("photo").digest))
        assert (length, digest) == (size, hashlib.sha256(content).hexdigest())


def test_open_returns_a_file(site: Site) -> None:
    visitor = site.visitor()
    visitor.run(lambda session: session.attach("photo", io.BytesIO(PHOTO)))

    def read(session: Any) -> None:
        file, model = session.open("photo"), io.BytesIO(PHOTO)
        for where in (0, FRAME - 3, FRAME, 3 * FRAME + 5, len(PHOTO) - 1, len(PHOTO), 2_000_000, 9):
            assert file.seek(where) == model.seek(where) == file.tell()
            for size in (10, 0, FRAME + 1):
                assert file.read(size) == model.read(size)
        assert file.seek(-5, io.SEEK_END) == len(PHOTO) - 5
        assert file.seek(2, io.SEEK_CUR) == len(PHOTO) - 3
        assert file.read() == PHOTO[-3:]
        with pytest.raises(ValueError, match="cannot seek"):
            file.seek(-1)
        file.seek(FRAME - 3)
        model.seek(FRAME - 3)
        assert [file.readline() for _ in range(3)] == [model.readline() for _ in range(3)]
        file.seek(0)
        buffer = bytearray(300_000)
        assert file.readinto(buffer) == 300_000
        assert buffer == PHOTO[:300_000]
        with file:
            assert (file.readable(), file.seekable(), file.writable()) == (True, True, False)
        with pytest.raises(ValueError, match="closed"):
            file.read()

    visitor.run(read)


def test_any_bytes_can_be_opened_and_nothing_else(site: Site) -> None:
    visitor = site.visitor()
    visitor.run(put(small=b"abc", large=PHOTO, text="x", rows=ROWS))

    def look(session: Any) -> None:
        session["new"] = PHOTO[::-1]
        for key, value in (("small", b"abc"), ("large", PHOTO), ("new", PHOTO[::-1])):
            assert session.open(key).read() == value
        session.attach("large", io.BytesIO(PHOTO[:-1]))
        assert session.open("large").read() == session["large"] == PHOTO[:-1]
        for key in ("text", "rows"):
            with pytest.raises(TypeError, match=f"session\\['{key}'\\] isn't bytes"):
                session.open(key)
        with pytest.raises(KeyError):
            session.open("none")

    with site.counted() as count:
        visitor.run(look)
    assert visitor.run(get("large")) == PHOTO[:-1]
    assert count.calls.count("write_frame") == 4 + 4


def test_files_that_cannot_be_attached(make_site: SiteMaker) -> None:
    site = make_site(max_value_bytes=FRAME + 10)
    visitor = site.visitor()
    visitor.run(lambda session: session.attach("photo", io.BytesIO(PHOTO[: FRAME + 10])))
    name = blob_of(site)

    def refused(session: Any) -> None:
        for file, error, words in (
            (io.BytesIO(PHOTO[: FRAME + 11]), SessionTooLarge, "SESSION_MAX_VALUE_BYTES allows"),
            (io.StringIO("x" * FRAME), TypeError, "a binary file"),
            ("photo.jpg", TypeError, "a binary file, not a value of type str"),
            (Trickle(PHOTO[: FRAME + 5], fails=True), ConnectionResetError, "went away"),
        ):
            with pytest.raises(error, match=words):
                session.attach("photo", file)
        with pytest.raises(ValueError, match="ttl is"):
            session.attach("photo", io.BytesIO(PHOTO), ttl=0)
        with pytest.raises(TypeError):
            session.attach(1, io.BytesIO(PHOTO))
        assert len(session["photo"]) == FRAME + 10

    visitor.run(refused)
    assert visitor.run(lambda session: session.open("photo").length) == FRAME + 10
    assert blob_of(site) == name


@pytest.mark.parametrize("frames", [1, 2, 3])
def test_the_frames_of_a_broken_upload_are_removed(site: Site, frames: int) -> None:
    class Broken(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            if self.tell() >= frames * FRAME:
                raise ConnectionResetError("the client went away")
            return super().read(size)

    def attach(session: Any) -> None:
        with pytest.raises(ConnectionResetError):
            session.attach("photo", Broken(PHOTO))

    site.visitor().run(attach)
    assert site.inside.blobs() == {}


def test_a_schema_checks_attached_files(make_site: SiteMaker) -> None:
    photo = SessionKey("photo", fields.Raw(validate=_is_photo), ttl=60, version=2)
    site = make_site(schema=[photo])
    visitor = site.visitor()

    def attach(session: Any) -> tuple[float, float, bool]:
        with pytest.raises(ValidationError, match="no photo"):
            session.attach("photo", io.BytesIO(bytes(1_000_000)))
        session.attach("photo", io.BytesIO(PHOTO))
        usual = session.ttl("photo")
        session.attach("photo", io.BytesIO(PHOTO), ttl=30)
        return usual, session.ttl("photo"), photo.get() == PHOTO

    assert visitor.run(attach) == (60, 30, True)
    assert visitor.run(lambda session: photo.get()) == PHOTO


def _is_photo(content: bytes) -> None:
    if not content.startswith(PHOTO[:10]):
        raise ValidationError("This is no photo.")


def test_an_attached_file_can_expire(site: Site, clock: FakeClock) -> None:
    visitor = site.visitor()

    def attach(session: Any) -> Any:
        for key, size in (("small", 10), ("large", 300_000)):
            session.attach(key, io.BytesIO(PHOTO[:size]), ttl=60)
        return session.ttl("large"), session.ttl("small"), len(session)

    assert visitor.run(attach) == (60, 60, 2)
    clock.advance(59)
    assert visitor.run(lambda session: (session.ttl("large"), len(session["large"]))) == (
        1,
        300_000,
    )
    clock.advance(1)
    assert visitor.run(lambda session: (list(session), session.get("large"))) == ([], None)


def test_a_file_that_replaces_an_expiring_value_does_not_expire(
    site: Site, clock: FakeClock
) -> None:
    visitor = site.visitor()
    visitor.run(lambda session: session.set("photo", b"old", ttl=60))

    def replace(session: Any) -> Any:
        looked = session["photo"]
        session.attach("photo", io.BytesIO(PHOTO))
        return looked, len(session["photo"]), session.ttl("photo")

    assert visitor.run(replace) == (b"old", len(PHOTO), None)
    clock.advance(61)
    assert visitor.run(lambda session: len(session.get("photo", b""))) == len(PHOTO)


def test_a_download_continues_after_the_session_was_saved(site: Site) -> None:
    visitor = site.visitor()
    visitor.run(lambda session: session.attach("photo", io.BytesIO(PHOTO)))

    def download(session: Any) -> Response:
        file = session.open("photo")
        return Response(iter(lambda: file.read(100_000), b""), mimetype="image/png")

    assert visitor.ask(download).data == PHOTO


def test_a_large_file_has_lines(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    looks = 0
    read1 = ValueReader.read1

    def counted(self: ValueReader, size: int = -1) -> bytes:
        nonlocal looks
        looks += 1
        return read1(self, size)

    monkeypatch.setattr(ValueReader, "read1", counted)
    lines = [b"x" * n + b"\n" for n in (0, 1, 300_000, 0, 5)] + [b"no end"]
    visitor = site.visitor()
    visitor.run(lambda session: session.attach("log", io.BytesIO(b"".join(lines))))

    def read(session: Any) -> list[bytes]:
        file = session.open("log")
        assert [file.readline(2), file.readline(0), file.readline(1)] == [b"\n", b"", b"x"]
        file.seek(0)
        return list(file)

    assert visitor.run(read) == lines
    assert looks < 20  # and not one for each byte


def test_a_download_breaks_off_where_the_rest_is_lost(site: Site) -> None:
    visitor = site.visitor()
    visitor.run(lambda session: session.attach("photo", io.BytesIO(PHOTO)))

    def read(session: Any) -> None:
        file = session.open("photo")
        missing(site, blob_of(site))
        assert file.read(FRAME) == PHOTO[:FRAME]
        with pytest.raises(ValueLost, match="a large value is lost: truncated"):
            file.read(1)

    visitor.run(read)
    assert visitor.run(lambda session: ("photo" in session, session.get("photo"))) == (True, None)
    visitor.run(lambda session: session.attach("photo", io.BytesIO(PHOTO)))
    altered(site, blob_of(site))

    def read_again(session: Any) -> None:
        with pytest.raises((KeyError, ValueLost)):
            session.open("photo").read()

    visitor.run(read_again)


def memory_of_streaming(visitor: Visitor, size: int) -> int:
    """The most memory, in bytes, that attaching and reading a file of that size takes."""

    class Zeros(io.RawIOBase):
        left = size

        def read(self, count: int = -1) -> bytes:
            part = min(count, self.left)
            self.left -= part
            return bytes(part)

    def most(work: Callable[[], int]) -> int:
        tracemalloc.start(1)
        try:
            assert work() == size
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    def read(session: Any) -> int:
        file = session.open("zeros")
        return sum(len(part) for part in iter(lambda: file.read(1 << 16), b""))

    writing: int = visitor.run(lambda s: most(lambda: s.attach("zeros", Zeros())))
    reading: int = visitor.run(lambda s: most(lambda: read(s)))
    return max(writing, reading)


@pytest.mark.parametrize("keys", [None, [b"k" * 32]], ids=["plain", "sealed"])
def test_memory_is_bounded(make_site: SiteMaker, keys: list[bytes] | None) -> None:
    site = make_site(encryption_keys=keys)
    if site.url.startswith("memory"):
        return
    visitor = site.visitor()
    assert memory_of_streaming(visitor, 20 * 1024 * 1024) < 4 * 1024 * 1024
    visitor.run(lambda session: session.destroy())


# Stores without a place for them -----------------------------------------------------------------


class Plain:
    """A store with only the seven verbs."""

    def __init__(self, store: Store) -> None:
        for name in ("create", "load", "save", "renew", "replace", "delete", "close"):
            setattr(self, name, getattr(store, name))


def test_on_a_store_without_a_place_they_stay_in_the_record(
    clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    store: Any = Plain(MemoryStore())
    site = Site("memory://", "", clock)
    site.ext = type(site.ext)(site.app, store=store, cookie_name="other", max_bytes=200_000)
    visitor = site.visitor()

    def work(_: Any) -> None:
        session = site.ext.session
        session["rows"] = ROWS
        with pytest.raises(SettingError, match="needs a place for large values"):
            session.attach("photo", io.BytesIO(PHOTO))

    visitor.run(work)
    assert visitor.run(lambda _: site.ext.session["rows"]) == ROWS
    (record,) = store.load.__self__._records.values()
    assert len(record.payload) > LIMIT
    visitor.run(lambda _: site.ext.session.destroy())
    assert not store.load.__self__._records


def test_a_logout_where_they_are_in_another_store(clock: FakeClock) -> None:
    site = Site("memory://", "", clock)
    store: Any = Plain(MemoryStore(StoreOptions(clock=clock)))
    site.ext = type(site.ext)(
        site.app, store=store, cookie_name="other", spill_store=site.store.blobs, clock=clock
    )
    visitor = site.visitor()
    for look in (lambda _: None, lambda session: session["photo"]):
        visitor.run(lambda _: site.ext.session.attach("photo", io.BytesIO(PHOTO)))
        assert len(site.inside.blobs()) == 1
        visitor.run(lambda _, look=look: (look(site.ext.session), site.ext.session.destroy()))
        assert site.inside.blobs() == {}


def test_a_conflict_over_a_large_value_can_be_refused(make_site: SiteMaker) -> None:
    site = make_site(conflict="reject")
    visitor = with_rows(site)
    tab = visitor.another_tab()

    def twice(session: Any) -> None:
        session["rows"].append("mine")
        session.update_atomic("n", lambda n: n + 1, 0)
        session["rows"].append("mine, too")  # nobody else changed it

    visitor.run(twice)
    site.before_a_write(lambda: tab.run(lambda session: session["rows"].append("theirs")))
    assert visitor.ask(lambda session: session["rows"].pop()).status_code == SessionConflict.code
    assert visitor.run(get())[-1] == "theirs"


# The bound of all of them together -------------------------------------------------------------


def test_the_large_values_of_a_session_have_a_bound_together(make_site: SiteMaker) -> None:
    site = make_site(max_total_bytes=500_000)
    visitor = site.visitor()
    visitor.run(put(photo=PHOTO[:300_000], small="x"))
    name = blob_of(site)

    def attach(session: Any) -> None:
        with pytest.raises(SessionTooLarge, match="may grow by 200000 more"):
            session.attach("other", io.BytesIO(PHOTO[:200_001]))

    def too_much(session: Any) -> None:
        session["other"] = PHOTO[300_000:510_000]

    def one_by_one(session: Any) -> None:
        with pytest.raises(SessionTooLarge, match="500001 bytes in large values"):
            session.update_atomic("other", lambda _: PHOTO[:200_001], default=b"")

    visitor.run(attach)
    assert visitor.ask(too_much).status_code == 500
    visitor.run(one_by_one)
    assert blob_of(site) == name
    visitor.run(lambda session: session.attach("other", io.BytesIO(PHOTO[:200_000])))
    visitor.run(put(photo=PHOTO[1:300_001]))  # another of the same length
    visitor.run(lambda session: session.attach("photo", io.BytesIO(PHOTO[2:300_002])))
    assert visitor.ask(put(photo=PHOTO[:300_001])).status_code == 500
    visitor.run(lambda session: session.pop("other"))
    visitor.run(put(photo=PHOTO[:400_000]))
    assert visitor.run(get("photo")) == PHOTO[:400_000]


def test_parallel_requests_share_the_bound(make_site: SiteMaker) -> None:
    site = make_site(max_total_bytes=500_000)
    visitor = site.visitor()
    visitor.run(put(n=0))
    tab = visitor.another_tab()
    site.before_a_write(lambda: tab.run(put(one=PHOTO[:300_000])))
    assert visitor.ask(put(other=PHOTO[:300_000])).status_code == 500
    assert visitor.run(lambda session: sorted(session)) == ["n", "one"]
    assert blob_of(site)


def test_a_lowered_bound_lets_a_session_shrink(make_site: SiteMaker) -> None:
    before = make_site()
    visitor = before.visitor()
    visitor.run(put(photo=PHOTO[:300_000], other=PHOTO[:200_000]))
    after = make_site(store=before.store, max_total_bytes=100_000)
    guest = after.visitor(visitor.cookie)
    guest.run(put(small=1))
    assert guest.run(get("photo")) == PHOTO[:300_000]
    assert guest.ask(put(more=PHOTO[:20_000])).status_code == 500
    guest.run(put(photo=PHOTO[:299_999]))
    guest.run(lambda session: session.pop("other"))
    assert guest.run(lambda session: sorted(session)) == ["photo", "small"]


def test_the_default_bound_follows_the_limit_of_one_value(make_site: SiteMaker) -> None:
    for settings, limit in (
        ({}, 32 << 20),
        ({"max_value_bytes": 1 << 20}, 32 << 20),
        ({"max_value_bytes": 64 << 20}, 64 << 20),
        ({"max_value_bytes": 64 << 20, "max_total_bytes": 1 << 20}, 1 << 20),
    ):
        site = make_site(**settings)
        repository = site.app.extensions["gsession"][site.ext].repository
        assert repository.settings.total_limit == limit
