"""The TTL index that removes expired documents: checks it, and how to create it.

An administrator may have made it under any name, so indexes are compared by their keys.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from pymongo.errors import OperationFailure

NAME = "gsession_expiry"
NEVER = 2**31 - 1  # seconds: with a journal, the TTL index must not remove documents


def expiry_index_advice(
    indexes: Mapping[str, Mapping[str, Any]], collection: str, field: str, after: int = 0
) -> str:
    """The mongosh commands that create the TTL index on ``field``, or "" if it exists.

    ``indexes`` is the result of ``index_information`` for the collection. ``after``: how many
    seconds after its expiry a document is to be removed.
    """
    options = f"{{expireAfterSeconds: {after}, name: '{NAME}'}}"
    create = f"db.{collection}.createIndex({{{field}: 1}}, {options})"
    in_the_way = []
    for name, index in indexes.items():
        keys = [*map(tuple, index["key"])]
        if keys in ([(field, 1)], [(field, -1)]):
            seconds = index.get("expireAfterSeconds")
            is_whole = not index.get("unique") and "partialFilterExpression" not in index
            if is_whole and seconds == after:
                return ""
            if is_whole and seconds is not None and keys == [(field, 1)]:
                options = f"{{name: {json.dumps(name)}, expireAfterSeconds: {after}}}"
                return f"db.runCommand({{collMod: '{collection}', index: {options}}})"
        if keys == [(field, 1)] or name == NAME:
            in_the_way.append(f"db.{collection}.dropIndex({json.dumps(name)})")
    return "; ".join([*in_the_way, create])


def check_expiry_index(collection: Any, field: str) -> str:
    """Like ``expiry_index_advice``. Without the right to list indexes, assumes there are none."""
    try:
        indexes = collection.index_information()
    except OperationFailure:
        indexes = {}
    return expiry_index_advice(indexes, collection.name, field)
