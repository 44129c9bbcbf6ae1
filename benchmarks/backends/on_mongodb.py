"""MongoDB: ours, Flask-Session's and the bare pymongo client on one server."""

from __future__ import annotations

import secrets
from contextlib import ExitStack
from datetime import UTC, datetime
from itertools import count
from typing import Any

import pymongo
from bson import Int64
from flask import Flask
from flask_session import Session as FlaskSession  # type: ignore[import-untyped]
from pymongo import MongoClient
from pymongo.read_concern import ReadConcern
from pymongo.write_concern import WriteConcern

from benchmarks.backends.base import Traffic
from benchmarks.measure import Call
from flask_gsession import Session
from tests.harness.servers import with_database

DATA_COMMANDS = ("find", "insert", "update", "delete", "findAndModify", "getMore", "aggregate")
"""What a request can cause. The driver's own heartbeats are other commands and are not counted."""


class MongoBackend:
    """Two fresh databases on the server: one for ours, one for Flask-Session.

    Both write with ``w=majority``, so that a write means the same thing to both, and leave
    journalling to the server's default.
    """

    def __init__(self, url: str) -> None:
        self._place = f"bench_{secrets.token_hex(4)}"
        self._url = url
        self._opened = ExitStack()
        self.client: MongoClient[dict[str, Any]] = MongoClient(url, w="majority")
        self._theirs: MongoClient[dict[str, Any]] = MongoClient(url, w="majority")

    def flask_session(self, app: Flask) -> None:
        app.config.update(
            SESSION_TYPE="mongodb",
            SESSION_MONGODB=self._theirs,
            SESSION_MONGODB_DB=f"{self._place}_theirs",
        )
        FlaskSession(app)

    def ours(self, app: Flask) -> None:
        session = Session(
            app, store=with_database(self._url, f"{self._place}_ours"), newcomers_per_minute=None
        )
        self._opened.callback(session.close, app)

    def floor(self) -> BareMongo:
        (document,) = self.client[f"{self._place}_ours"]["gsession"].find()
        return BareMongo(self.client[f"{self._place}_floor"], document)

    def traffic(self, call: Call, times: int) -> Traffic:
        # The driver's heartbeats add bytes now and then, and only ever add: the least of three
        # measurements is the one without them.
        return min((self._traffic_once(call, times) for _ in range(3)), key=_bytes)

    def versions(self) -> dict[str, str]:
        return {"MongoDB": self.client.server_info()["version"], "PyMongo": pymongo.version}

    def close(self) -> None:
        self._opened.close()
        for part in ("ours", "theirs", "floor"):
            self.client.drop_database(f"{self._place}_{part}")
        self.client.close()
        self._theirs.close()

    def _traffic_once(self, call: Call, times: int) -> Traffic:
        idle = self._statistics()
        before = self._statistics()
        for _ in range(times):
            call()
        after = self._statistics()
        spent = {
            name: (after[name] - before[name] - (before[name] - idle[name])) / times
            for name in after
        }
        received, sent = spent.pop("bytesIn"), spent.pop("bytesOut")
        commands = {name: n for name, n in spent.items() if n}
        return Traffic(sum(commands.values()), commands, received, sent)

    def _statistics(self) -> dict[str, int]:
        """Calls per command and bytes, since the server started."""
        status = self.client.admin.command("serverStatus")
        return {
            **{name: status["metrics"]["commands"][name]["total"] for name in DATA_COMMANDS},
            "bytesIn": status["network"]["bytesIn"],
            "bytesOut": status["network"]["bytesOut"],
        }


class BareMongo:
    """The find_one of a load and the update_one of a save, on a copy of one of our documents."""

    def __init__(self, database: Any, document: dict[str, Any]) -> None:
        self._collection = database.get_collection(
            "gsession", read_concern=ReadConcern("majority"), write_concern=WriteConcern("majority")
        )
        self._collection.insert_one(document)
        self._key = {"_id": document["_id"]}
        self._fresh = count(1)

    def read(self) -> object:
        return self._collection.find_one(self._key)

    def write(self) -> object:
        document = self._collection.find_one(self._key)
        live = {"successor": None, "idle_expires_at": {"$gt": datetime.now(UTC)}}
        fresh = Int64(next(self._fresh))
        versions = {"$in": [document["version"], fresh]}
        document["version"] = fresh
        del document["_id"]
        done = self._collection.update_one(
            {**self._key, **live, "version": versions}, {"$set": document}
        )
        if done.modified_count != 1:
            raise RuntimeError("the floor's own document is gone")
        return None


def _bytes(traffic: Traffic) -> float:
    return (traffic.received or 0) + (traffic.sent or 0)
