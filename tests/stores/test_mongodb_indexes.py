"""The TTL index that an administrator made: which ones count, and advice that works."""

import json
import re
from typing import Any
from urllib.parse import urlsplit

import pytest
from pymongo.collection import Collection

from flask_gsession.stores import StoreOptions, open_store
from flask_gsession.testing import FakeClock, a_record

FIELD = "idle_expires_at"
TTL = {"expireAfterSeconds": 0}
OURS = "gsession_expiry"

RIGHT: dict[str, list[tuple[Any, dict[str, Any]]]] = {
    "ours": [([(FIELD, 1)], {**TTL, "name": OURS})],
    "of another name": [([(FIELD, 1)], TTL)],
    "descending": [([(FIELD, -1)], TTL)],
    "sparse": [([(FIELD, 1)], {**TTL, "sparse": True})],
    "beside others": [([(FIELD, 1), ("a", 1)], {}), ([(FIELD, -1)], TTL), ([("a", 1)], {})],
}
WRONG: dict[str, list[tuple[Any, dict[str, Any]]]] = {
    "of an hour": [([(FIELD, 1)], {"expireAfterSeconds": 3600})],
    "of an hour under our name": [([(FIELD, 1)], {"expireAfterSeconds": 3600, "name": OURS})],
    "of an hour with quotes": [([(FIELD, 1)], {"expireAfterSeconds": 3600, "name": 'it\'s "x"'})],
    "without expiry": [([(FIELD, 1)], {})],
    "our name on another field": [([("a", 1)], {"name": OURS})],
    "our name on more fields": [([(FIELD, 1), ("a", 1)], {"name": OURS})],
    "two in the way": [([("a", 1)], {"name": OURS}), ([(FIELD, 1)], {})],
}


def start(url: str, prefix: str) -> Any:
    """A store that has written a record, and so looked at its index."""
    store = open_store(url, StoreOptions(prefix=prefix, timeout=10))[0]
    store.create(a_record(FakeClock()))
    return store


def expiry_findings(store: Any) -> list[Any]:
    return [each for each in store.checks.check() if each.check == "expiry index"]


def follow(advice: str, collection: "Collection[dict[str, Any]]") -> None:
    """Run the commands of mongosh that a text ends with."""
    for command in advice.partition("administrator run: ")[2].split("; "):
        if changed := re.fullmatch(
            r"db\.runCommand\(\{collMod: '(\w+)', "
            r"index: \{name: (\".*\"), expireAfterSeconds: 0\}\}\)",
            command,
        ):
            index = {"name": json.loads(changed[2]), "expireAfterSeconds": 0}
            collection.database.command({"collMod": changed[1], "index": index})
        elif dropped := re.fullmatch(r"db\.(\w+)\.dropIndex\((\".*\")\)", command):
            collection.database[dropped[1]].drop_index(json.loads(dropped[2]))
        else:
            made = re.fullmatch(
                r"db\.(\w+)\.createIndex\(\{(\w+): 1\}, \{expireAfterSeconds: 0, name: '(\w+)'\}\)",
                command,
            )
            assert made is not None, command
            collection.database[made[1]].create_index(made[2], name=made[3], expireAfterSeconds=0)


@pytest.fixture
def collection(mongodb_url: str, mongo_client: Any) -> "Collection[dict[str, Any]]":
    """The collection of the sessions, before a store has written to it."""
    found: Collection[dict[str, Any]] = mongo_client[urlsplit(mongodb_url).path[1:]]["gsession"]
    return found


@pytest.mark.parametrize("indexes", RIGHT.values(), ids=RIGHT)
def test_a_right_index_is_found_right(
    indexes: list[tuple[Any, dict[str, Any]]],
    collection: "Collection[dict[str, Any]]",
    mongodb_url: str,
    store_prefix: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    for keys, options in indexes:
        collection.create_index(keys, **options)
    store = start(mongodb_url, store_prefix)
    assert "index" not in caplog.text
    assert [each.severity for each in expiry_findings(store)] == ["ok"]
    store.close()


@pytest.mark.parametrize("says", ["log", "doctor"])
@pytest.mark.parametrize("indexes", WRONG.values(), ids=WRONG)
def test_the_advice_on_a_wrong_index_works(
    indexes: list[tuple[Any, dict[str, Any]]],
    says: str,
    collection: "Collection[dict[str, Any]]",
    mongodb_url: str,
    store_prefix: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    for keys, options in indexes:
        collection.create_index(keys, **options)
    store = start(mongodb_url, store_prefix)
    (found,) = expiry_findings(store)
    assert (found.severity, found.found) == ("error", "not right")
    (warned,) = [text for text in caplog.messages if "TTL index" in text]
    follow(warned if says == "log" else found.advice, collection)
    store.close()
    caplog.clear()
    store = start(mongodb_url, store_prefix)
    assert "index" not in caplog.text
    assert [each.severity for each in expiry_findings(store)] == ["ok"]
    store.close()
