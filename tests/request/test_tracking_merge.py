"""G3 and G6 in small: a request's changes are noticed, and merged into stored ones."""

from __future__ import annotations

import copy
import math
import threading
from collections.abc import Callable
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from markupsafe import Markup
from werkzeug.exceptions import ImATeapot

from flask_gsession.errors import (
    SessionConflict,
    SessionTooLarge,
    UnreadableRecord,
    UnsupportedType,
    ValueRefused,
)
from flask_gsession.request.rebasing import set_stored
from flask_gsession.request.tracking import TrackedValues
from flask_gsession.values.codec import Codec
from flask_gsession.values.marks import PLAIN, Mark
from flask_gsession.values.merge import (
    MISSING,
    POLICIES,
    Change,
    MergeFunction,
    Merger,
    last,
    reject,
)
from tests.values.test_codec import shape, values

CODEC = Codec(64)
BAD = b"\xc1"


def stored(items: dict[str, Any]) -> dict[str, bytes]:
    """The encoded form of a session."""
    return {key: CODEC.encode(key, value) for key, value in items.items()}


def plain(items: dict[str, bytes]) -> dict[str, Any]:
    """The session behind the encoded form."""
    return {key: CODEC.decode(raw) for key, raw in items.items()}


def tracked(**items: Any) -> TrackedValues:
    """The values of a session that was just loaded."""
    encoded = stored(items)
    return TrackedValues(CODEC, encoded, None, threading.RLock(), (encoded, {}))


def changed(values: TrackedValues) -> dict[str, tuple[Any, Any]]:
    """The values of each changed key before and after; MISSING for an absent one."""

    def value(raw: bytes | None) -> Any:
        return MISSING if raw is None else CODEC.decode(raw)

    return {key: (value(base), value(mine)) for key, (base, mine) in values.changes().items()}


# TrackedValues -------------------------------------------------------------------------------


def test_another_thread_of_the_request_may_look_while_it_is_saved() -> None:
    class Looking(Codec):
        def encode(self, key: str, value: object) -> bytes:
            assert f"absent {key}" not in values
            assert values["c"] == [3]
            return super().encode(key, value)

    values = TrackedValues(Looking(64), stored({"a": [1], "b": [2], "c": [3]}))
    values["a"].append(0)
    values["b"].append(0)
    assert changed(values) == {"a": ([1], [1, 0]), "b": ([2], [2, 0])}


@pytest.mark.parametrize("looked_before", [True, False])
def test_a_look_is_overtaken_by_another_thread(looked_before: bool) -> None:
    class Overtaken(Codec):
        """Another thread stores a change at the first look without the mutex."""

        def decode(self, raw: bytes) -> Any:
            value = super().decode(raw)
            if pending:
                other = threading.Thread(target=pending.pop())
                other.start()
                other.join()
            return value

    pending: list[Callable[[], None]] = []
    before, after = stored({"n": 1, "other": "a"}), stored({"n": 2, "other": "b"})
    values = TrackedValues(Overtaken(64), before, None, threading.RLock(), (before, {}))
    if looked_before:
        assert values["n"] == 1
    pending.append(lambda: values.rebase(after))
    assert values["other"] == "b"  # its decoded value was replaced
    seen = 1 if looked_before else 2  # as the request saw it first
    assert values["n"] == seen
    values["n"] = 3
    values["other"] = "c"
    assert changed(values) == {"n": (seen, 3), "other": ("b", "c")}


def test_a_deleted_value_that_was_looked_at_stays_deleted() -> None:
    values = tracked(n=1, rest=2)
    assert (values["n"], values["rest"]) == (1, 2)
    del values["n"]
    assert "n" not in values
    assert changed(values) == {"n": (1, MISSING)}
    values.rebase(stored({"rest": 2}), saved=values.changes())
    with pytest.raises(KeyError):
        values["n"]
    assert list(values) == ["rest"]
    assert not values.changes()


def test_nothing_is_decoded_before_it_is_looked_at() -> None:
    values = TrackedValues(CODEC, {**stored({"good": 1}), "bad": BAD})
    assert values["good"] == 1
    assert list(values) == ["good", "bad"]
    assert len(values) == 2
    assert "bad" in values
    assert values.changes() == {}
    with pytest.raises(UnreadableRecord):
        values["bad"]


def test_a_value_is_one_object_all_along() -> None:
    values = tracked(cart=[])
    values["cart"].append("mug")
    assert values["cart"] is values["cart"]
    assert values["cart"] == ["mug"]


def test_looking_changes_nothing() -> None:
    values = tracked(a=1, b=[1], c={"x": {2}}, d=(1, [2]), e=math.nan, f=[math.nan], g={3, "3"})
    for key in values:
        values[key]
    assert values.changes() == {}


@given(values)
def test_looking_at_any_value_changes_nothing(value: Any) -> None:
    values = tracked(key=value)
    values["key"]
    assert values.changes() == {}
    values["key"] = copy.deepcopy(value)
    assert values.changes() == {}


def test_nested_changes_are_noticed() -> None:
    change: Callable[[Any], object]
    for value, change in [
        ([], lambda v: v.append(1)),
        ([1, 2], lambda v: v.reverse()),
        ({}, lambda v: v.update(a=1)),
        ({"a": 1}, lambda v: v.clear()),
        ({"a": 1, "b": 2}, lambda v: v.update(a=v.pop("a"))),  # another order
        ({1}, lambda v: v.add(2)),
        ({1}, lambda v: v.discard(1)),
        ((1, []), lambda v: v[1].append(2)),
        ([{"deep": ([0],)}], lambda v: v[0]["deep"][0].__setitem__(0, 1)),
        ([1], lambda v: v.__setitem__(0, True)),
        ([1], lambda v: v.__setitem__(0, 1.0)),
        ([0.0], lambda v: v.__setitem__(0, -0.0)),
        (["a"], lambda v: v.__setitem__(0, Markup("a"))),
        (["1.0"], lambda v: v.__setitem__(0, Decimal("1.0"))),
    ]:
        values = tracked(key=value, other=[1])
        change(values["key"])
        assert list(values.changes()) == ["key"], value


def test_an_undone_change_is_not_a_change() -> None:
    values = tracked(cart=["mug"], name="ada")
    values["cart"].append("pen")
    values["cart"].pop()
    values["name"] = "eve"
    values["name"] = "ada"
    values["new"] = 1
    del values["new"]
    del values["cart"]
    values["cart"] = ["mug"]
    assert values.changes() == {}


def test_changes_say_before_and_after() -> None:
    values = tracked(kept=0, set=1, deleted=2, nested=[3])
    values["set"] = "one"
    del values["deleted"]
    values["nested"].append(4)
    values["new"] = None
    assert changed(values) == {
        "set": (1, "one"),
        "deleted": (2, MISSING),
        "nested": ([3], [3, 4]),
        "new": (MISSING, None),
    }


def test_a_deleted_key_is_gone_until_it_is_set() -> None:
    values = tracked(a=1, b=[2])
    for key in ("a", "b"):
        del values[key]
        assert key not in values
        with pytest.raises(KeyError):
            values[key]
        with pytest.raises(KeyError):
            del values[key]
    assert list(values) == []
    assert len(values) == 0
    values["a"] = 3
    assert list(values) == ["a"]
    assert values["a"] == 3


def test_missing_keys_and_keys_that_are_none() -> None:
    values = tracked(a=1)
    with pytest.raises(KeyError):
        values["b"]
    with pytest.raises(KeyError):
        del values["b"]
    assert None not in values
    assert 1 not in values
    assert values.changes() == {}


def test_a_value_that_cannot_be_kept_is_refused_with_the_changes() -> None:
    values = tracked(a=[1])
    values["a"].append(object())
    with pytest.raises(UnsupportedType, match=r"session\['a'\]\[1\]"):
        values.changes()
    values["a"].pop()
    values["b"] = values
    with pytest.raises(UnsupportedType, match="TrackedValues"):
        values.changes()
    nested: list[Any] = []
    nested.append(nested)
    values["b"] = nested
    with pytest.raises(SessionTooLarge):
        values.changes()


def test_the_base_of_a_change_is_the_value_first_seen() -> None:
    """It must not follow changes of other requests, or a save would overwrite them."""
    values = tracked(seen=[1], unseen=[1], assigned=1, deleted=1, number=1)
    values["seen"].append("mine")
    values["assigned"] = 2
    del values["deleted"]
    assert values["number"] == 1
    assert "looked for" not in values
    with pytest.raises(KeyError):
        values["asked for"]
    now = {"seen": [9], "unseen": [9], "assigned": 9, "number": 9, "new": 9}
    values.rebase(stored({**now, "looked for": 9, "asked for": 9}))
    # Values that were read stay the same; others are the current ones.
    assert values["seen"] == [1, "mine"]
    assert values["number"] == 1
    assert "looked for" not in values
    assert "asked for" not in values
    assert values["unseen"] == [9]
    assert values["new"] == 9
    assert changed(values) == {
        "seen": ([1], [1, "mine"]),
        "assigned": (1, 2),
        "deleted": (1, MISSING),
    }
    values["number"] += 1
    values["looked for"] = 1
    assert changed(values)["number"] == (1, 2)
    assert changed(values)["looked for"] == (MISSING, 1)


def test_keys_that_others_deleted_stay_where_they_were_seen() -> None:
    values = tracked(held=[1], number=1, unseen=1)
    held = values["held"]
    assert values["number"] == 1
    values.rebase({})
    assert sorted(values) == ["held", "number"]
    assert values["held"] is held
    assert values.changes() == {}  # seeing is not writing: the deletion stands
    held.append(2)
    assert changed(values) == {"held": ([1], [1, 2])}


def test_accepted_changes_no_longer_count_as_changes() -> None:
    values = tracked(a=[1], b=2, c=3)
    cart = values["a"]
    cart.append(2)
    values["b"] = 20
    del values["c"]
    changes = values.changes()
    now = stored({"a": [1, 2], "b": 20, "theirs": 5})
    values.rebase(now, saved=changes)
    assert values.changes() == {}
    assert values["a"] is cart
    assert {key: values[key] for key in values} == {"a": [1, 2], "b": 20, "theirs": 5}
    cart.append(3)
    assert changed(values) == {"a": ([1, 2], [1, 2, 3])}


def test_a_merged_value_is_merged_again_at_its_next_change() -> None:
    values = tracked(hits=1, tags={"a"})
    tags = values["tags"]
    values["hits"] += 1
    tags.add("mine")
    changes = values.changes()
    values.rebase(stored({"hits": 12, "tags": {"a", "mine", "theirs"}}), saved=changes)
    assert values["hits"] == 2
    assert values["tags"] is tags
    assert values.changes() == {}
    values["hits"] += 1
    tags.add("more")
    assert changed(values) == {
        "hits": (2, 3),
        "tags": ({"a", "mine"}, {"a", "mine", "more"}),
    }


@pytest.mark.parametrize("way", ["given", "stored by others"])
def test_a_value_has_its_own_mark_instead_of_the_previous_one(way: str) -> None:
    values, theirs = TrackedValues(CODEC), stored({"key": "theirs"})
    values.set("key", "mine", Mark(expires_at=5000), lambda: 1000)
    if way == "given":
        values.set_encoded("key", theirs["key"], lambda: 1000)
    else:
        changes = values.changes()
        values.rebase({"key": changes["key"].mine or b""}, saved=changes)
        del values["key"]
        values.rebase({}, saved=values.changes())
        values.rebase(theirs)
    assert values["key"] == "theirs"
    assert values.mark("key") == PLAIN
    assert changed(values) == ({"key": (MISSING, "theirs")} if way == "given" else {})


def test_a_settled_key_is_stored() -> None:
    values = tracked(hits=1)
    values["hits"] = 7
    set_stored(values, "hits", 8, CODEC.encode("hits", 8))
    assert values["hits"] == 8
    assert changed(values) == {}


# A request's values against a plain dict -----------------------------------------------------

keys = st.sampled_from(["a", "b", "c", ""])
small = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 2) | st.sampled_from(["", "x", 0.0, -0.0, b"x"]),
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.lists(inner, max_size=2).map(tuple)
        | st.dictionaries(keys, inner, max_size=2)
        | st.sets(st.integers(0, 3), max_size=2)
    ),
    max_leaves=4,
)


def nested_change(value: Any, by: Any) -> None:
    """Change something inside `value` where that is possible."""
    if type(value) is list:
        value.append(by)
    elif type(value) is dict:
        value["a"] = by
    elif type(value) is set:
        value ^= {len(value)}
    elif type(value) is tuple:
        for item in value:
            nested_change(item, by)


steps = st.lists(
    st.one_of(
        st.tuples(st.just("look"), keys, st.none()),
        st.tuples(st.just("set"), keys, small),
        st.tuples(st.just("delete"), keys, st.none()),
        st.tuples(st.just("change"), keys, small),
        st.tuples(st.just("save"), st.none(), st.none()),
    ),
    max_size=12,
)


@settings(max_examples=300)
@given(st.dictionaries(keys, small, max_size=3), steps)
def test_any_sequence_of_operations_equals_a_plain_dict(
    start: dict[str, Any], steps: list[tuple[str, Any, Any]]
) -> None:
    real, model = tracked(**start), copy.deepcopy(start)
    merger = Merger(CODEC, last, {})
    for step, key, value in steps:
        if step == "look":
            assert (key in real) is (key in model)
            if key in model:
                assert shape(real[key]) == shape(model[key])
        elif step == "set":
            real[key], model[key] = copy.deepcopy(value), copy.deepcopy(value)
        elif step == "delete":
            if key in model:
                del real[key], model[key]
            else:
                with pytest.raises(KeyError):
                    del real[key]
        elif step == "change" and key in model:
            nested_change(real[key], copy.deepcopy(value))
            nested_change(model[key], copy.deepcopy(value))
        elif step == "save":
            changes = real.changes()
            real.rebase(merger.apply(real.stored, changes), saved=changes)
            assert real.changes() == {}
        assert len(real) == len(model)
        assert set(real) == set(model)
    before = plain(real.stored)
    changes = real.changes()
    after = merger.apply(real.stored, changes)
    assert same_items(plain(after), model)
    assert same_items({key: real[key] for key in real}, model)
    # Only a different value is a change.
    assert set(changes) == {
        key
        for key in before.keys() | model.keys()
        if shape(before.get(key, ...)) != shape(model.get(key, ...))
    }


def same_items(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two dicts hold exactly the same, in whatever order."""
    return {k: shape(v) for k, v in one.items()} == {k: shape(v) for k, v in other.items()}


# Merger --------------------------------------------------------------------------------------


def merge(
    base: dict[str, Any],
    theirs: dict[str, Any],
    mine: dict[str, Any],
    default: MergeFunction = last,
    **policies: MergeFunction,
) -> dict[str, Any]:
    """The values stored after a request that saw `base`, and wants `mine`, met `theirs`."""
    before, wanted = stored(base), stored(mine)
    changes = {
        key: Change(before.get(key), wanted.get(key))
        for key in before.keys() | wanted.keys()
        if before.get(key) != wanted.get(key)
    }
    return plain(Merger(CODEC, default, policies).apply(stored(theirs), changes))


sessions = st.dictionaries(keys, small, max_size=4)


@given(sessions, sessions)
def test_without_others_mine_is_stored(base: dict[str, Any], mine: dict[str, Any]) -> None:
    for default in (last, reject):
        assert same_items(merge(base, base, mine, default), mine)


@given(sessions, sessions)
def test_without_my_changes_theirs_stays(base: dict[str, Any], theirs: dict[str, Any]) -> None:
    for default in (last, reject):
        assert same_items(merge(base, theirs, base, default), theirs)


@given(sessions, sessions, sessions)
def test_each_key_is_merged_for_itself(
    base: dict[str, Any], theirs: dict[str, Any], mine: dict[str, Any]
) -> None:
    merged = merge(base, theirs, mine)
    for key in base.keys() | theirs.keys() | mine.keys() | merged.keys():
        untouched = shape(mine.get(key, ...)) == shape(base.get(key, ...))
        winner = theirs if untouched else mine
        assert shape(merged.get(key, ...)) == shape(winner.get(key, ...))


@given(sessions, sessions, sessions)
def test_changes_to_different_keys_both_survive(
    base: dict[str, Any], theirs: dict[str, Any], mine: dict[str, Any]
) -> None:
    mine = {**base, **{f"my {key}": value for key, value in mine.items()}}
    theirs = {**base, **{f"their {key}": value for key, value in theirs.items()}}
    for default in (last, reject):
        assert same_items(merge(base, theirs, mine, default), {**theirs, **mine})


@pytest.mark.parametrize(
    ("base", "theirs", "mine"),
    [
        ({"a": 1}, {"a": 2}, {"a": 3}),
        ({"a": 1}, {"a": 2}, {}),
        ({"a": 1}, {}, {"a": 3}),
        ({}, {"a": 2}, {"a": 3}),
        ({"a": [1]}, {"a": [1, 2]}, {"a": [1, 3]}),
        ({"a": 1}, {"a": True}, {"a": 2}),
    ],
)
def test_reject_refuses_keys_that_both_changed(
    base: dict[str, Any], theirs: dict[str, Any], mine: dict[str, Any]
) -> None:
    for policies in ({"default": reject}, {"a": reject}):
        with pytest.raises(SessionConflict) as conflict:
            merge(base, theirs, mine, **policies)
        assert conflict.value.code == 409
    assert merge(base, theirs, mine, reject, a=last) == mine


@pytest.mark.parametrize("policy", [name for name in POLICIES if name != "reject"])
def test_my_deletion_wins_under_every_other_policy(policy: str) -> None:
    for base, theirs in [({"a": 1}, {"a": 5}), ({"a": [1]}, {"a": [1, 2]}), ({"a": 1}, {})]:
        assert merge(base, theirs, {}, a=POLICIES[policy]) == {}


def test_a_function_of_the_application_decides() -> None:
    seen: list[tuple[Any, ...]] = []

    def longest(base: Any, theirs: Any, mine: Any) -> Any:
        seen.append((base, theirs, mine))
        return max(theirs or "", mine, key=len)

    assert merge({"a": ""}, {"a": "longer"}, {"a": "long"}, a=longest) == {"a": "longer"}
    assert merge({}, {}, {"a": "long"}, a=longest) == {"a": "long"}
    assert merge({}, {"a": "x"}, {"a": "long"}, a=longest) == {"a": "long"}
    assert merge({"a": "x"}, {}, {"a": "long"}, a=longest) == {"a": "long"}
    assert seen == [("", "longer", "long"), (MISSING, "x", "long"), ("x", MISSING, "long")]


def test_results_and_errors_of_merge_functions() -> None:
    def fail(error: Exception) -> MergeFunction:
        def policy(base: Any, theirs: Any, mine: Any) -> Any:
            raise error

        return policy

    def merged_by(policy: MergeFunction) -> object:
        return merge({"a": "base"}, {"a": "theirs"}, {"a": "mine"}, a=policy)

    for error in (SessionConflict(), ImATeapot()):
        with pytest.raises(type(error)):
            merged_by(fail(error))
    with pytest.raises(ValueRefused, match="its merge policy policy failed with KeyError") as r:
        merged_by(fail(KeyError("theirs")))
    assert "theirs" not in str(r.value)
    assert r.value.path == "session['a']"
    with pytest.raises(UnsupportedType, match="object"):
        merged_by(lambda base, theirs, mine: object())
    with pytest.raises(UnsupportedType):
        merged_by(lambda base, theirs, mine: MISSING)


def test_missing_is_falsy_and_names_itself() -> None:
    assert not MISSING
    assert repr(MISSING) == "MISSING"


# The ready-made policies ---------------------------------------------------------------------


def by(policy: str, base: Any, theirs: Any, mine: Any) -> Any:
    """The value after a merge of one key under a policy."""
    sides = ({} if side is MISSING else {"key": side} for side in (base, theirs, mine))
    return merge(*sides, key=POLICIES[policy])["key"]


@given(*[st.integers() | st.just(MISSING)] * 2, st.integers())
def test_counters_count_both(base: Any, theirs: Any, mine: int) -> None:
    if base != theirs:
        expected = (theirs or 0) + mine - (base or 0) if mine != base else theirs
        if expected is not MISSING:
            assert by("counter", base, theirs, mine) == expected


def test_counters_of_other_numbers() -> None:
    assert by("counter", 0.5, 1.5, 0.75) == 1.75
    price = by("counter", Decimal("1.10"), Decimal("2.10"), Decimal("1.15"))
    assert shape(price) == shape(Decimal("2.15"))
    assert by("counter", MISSING, 10, -1) == 9


int_sets = st.sets(st.integers(0, 6))


@given(int_sets | st.just(MISSING), int_sets | st.just(MISSING), int_sets)
def test_sets_apply_additions_and_removals_of_both(base: Any, theirs: Any, mine: set[int]) -> None:
    if base in (theirs, mine):
        return
    merged = by("set", base, theirs, mine)
    before, stored_now = base or set(), theirs or set()
    for item in range(7):
        if (item in mine) != (item in before):
            assert (item in merged) is (item in mine)
        else:
            assert (item in merged) is (item in stored_now)
    assert type(merged) is set


def test_a_set_stays_of_my_kind() -> None:
    merged = by("set", frozenset({1}), frozenset({1, 2}), frozenset({1, 3}))
    assert shape(merged) == shape(frozenset({1, 2, 3}))


dicts = st.dictionaries(st.sampled_from("abc"), small | st.just(math.nan), max_size=3)


@given(dicts | st.just(MISSING), dicts | st.just(MISSING), dicts)
def test_dicts_are_merged_entry_by_entry(base: Any, theirs: Any, mine: dict[str, Any]) -> None:
    sides = [stored({"key": side}) if side is not MISSING else {} for side in (base, theirs, mine)]
    if sides[0] in sides[1:]:
        return  # no conflict, nothing for a policy
    merged = by("dict", base, theirs, mine)
    before, now = base or {}, theirs or {}
    for entry in "abc":
        untouched = shape(mine.get(entry, ...)) == shape(before.get(entry, ...))
        winner = now if untouched else mine
        assert shape(merged.get(entry, ...)) == shape(winner.get(entry, ...))
    assert set(merged) <= set("abc")


@given(*[st.lists(small | st.just(math.nan), max_size=3)] * 3)
def test_lists_that_only_grew_keep_both_additions(
    base: list[Any], theirs: list[Any], mine: list[Any]
) -> None:
    if theirs and mine:
        merged = by("append", base, base + theirs, base + mine)
        assert shape(merged) == shape(base + theirs + mine)
    if theirs != base and mine:
        assert shape(by("append", base, theirs, base + mine)) == shape(theirs + mine)


@pytest.mark.parametrize(
    ("base", "mine"),
    [([1, 2], [1]), ([1, 2], [2, 1]), ([1], [0, 1]), ([1], []), ([1], [True]), ([0.0], [-0.0, 1])],
)
def test_a_list_that_did_more_than_grow_is_a_conflict(base: list[Any], mine: list[Any]) -> None:
    with pytest.raises(SessionConflict):
        by("append", base, [*base, "theirs"], mine)


@pytest.mark.parametrize(
    ("policy", "right", "wrong"),
    [
        ("counter", [1, 2, 3], ["1", [], None, True, {"a": 1}, b"1", ""]),
        ("set", [{1}, {2}, {3}], [[1], "abc", {"a": 1}, None, 7, (1,), ""]),
        ("dict", [{"a": 1}, {"b": 2}, {"c": 3}], [[("a", 1)], {1}, "ab", None, 7, []]),
        ("append", [[1], [1, 2], [1, 3]], [(1,), "ab", {"a": 1}, None, 7, {1}, ""]),
    ],
)
def test_a_policy_refuses_values_of_another_kind(
    policy: str, right: list[Any], wrong: list[Any]
) -> None:
    for value in wrong:
        for place in range(3):
            sides = [*right[:place], value, *right[place + 1 :]]
            with pytest.raises(ValueRefused, match="can merge values of these types") as refusal:
                by(policy, *sides)
            assert refusal.value.path == "session['key']"
    by(policy, *right)


@pytest.mark.parametrize("policy", ["counter", "set", "dict", "append"])
def test_a_policy_leaves_its_arguments_alone(policy: str) -> None:
    sides = {
        "counter": (1, 5, 2),
        "set": ({1, 2}, {1, 3}, {2, 4}),
        "dict": ({"a": [1], "b": 1}, {"a": [1], "c": 2}, {"a": [2]}),
        "append": ([[1]], [[1], [2]], [[1], [3]]),
    }[policy]
    before = copy.deepcopy(sides)
    POLICIES[policy](*sides)
    assert shape(sides) == shape(before)
