"""Scans all our keys in Redis, node by node, with SCAN and never with KEYS.

A cursor holds the first hash slot of a node (0 without a cluster), the run id of its server, and
the server's own cursor. That is only valid for one run of one server: if the run id differs, the
scan of the node starts again.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import NoPermissionError, RedisError, ResponseError

from ...errors import StoreUnavailable, UnreadableRecord
from ..base import KEY_LENGTH, OTHER_ENDS, Record
from ..interrupts import reraise_interruption
from ..parts import COUNT_ALL, LOST_EXPIRY, Counts, Page, Scans, Tidied, Upkeep
from .commands import Script, packed
from .layout import unpack
from .pool import Node, ask_all, described, hint
from .records import Records

_TIDY = Script("tidy")
_SCANS = 4  # at most, to sample the keys of a server
_RUN_ID = re.compile(rb"run_id:(\w+)")
_BATCH = 1000  # keys that one SCAN examines at most, since it blocks all other clients
_CURSOR = re.compile(r"(\d+):(\w*):(\d+)", re.ASCII)


class _Found(NamedTuple):
    """Names that one SCAN found at a node, and the next cursor."""

    node: Node
    names: list[bytes]
    cursor: str


class RedisScans(Scans, Upkeep, Counts):
    """The parts ``scans``, ``upkeep`` and ``counts`` of a Redis store."""

    def __init__(self, records: Records) -> None:
        self._records = records
        self._commands = records.commands
        self._start = records.names.prefix.encode()
        # Keys of another length than a session key aren't ours.
        key = rb"\{([\w-]{%d})\}(:lock)?" % KEY_LENGTH
        self._name = re.compile(re.escape(self._start) + key, re.ASCII)
        blob = rb"blob:\{[0-9a-f]{32}\}"
        self._blob = re.compile(re.escape(self._start) + blob, re.ASCII)

    def scan(self, cursor: str = "", limit: int = 200, begins: str = "") -> Page:
        deadline = self._commands.deadline()
        nodes = self._commands.nodes(deadline)
        found = self._find(nodes, cursor, limit, b"{" + begins.encode(), deadline)
        keys: list[str] = []
        for name in found.names:
            match = self._name.fullmatch(name)
            if match and not match[2] and match[1].startswith(begins.encode()):
                keys.append(match[1].decode())
        values = self._ask(
            found.node,
            [packed(b"GET", self._records.names.record(key)) for key in keys],
            deadline,
        )
        records, unreadable = [], []
        for key, value in zip(keys, values, strict=True):
            if value is None:
                continue
            try:
                if isinstance(value, bytes):
                    record: Record | None = unpack(key, value)
                else:  # not a string, or its slot is moving to another node
                    record = self._records.load(key, deadline)
            except UnreadableRecord:
                unreadable.append(key)
            else:
                if record is not None and self._commands.now() < record.idle_expires_at:
                    records.append(record)
        return Page(records, unreadable, found.cursor)

    def count(self) -> int:
        """About how many sessions are live, by at most four short steps of SCAN at each server."""
        return sum(map(self._count_at, self._commands.servers()))

    def _count_at(self, name: bytes) -> int:
        deadline = self._commands.deadline()

        def ask(*words: bytes) -> Any:
            return self._commands.ask(deadline, name, packed(*words))

        start = self._start + b"{"
        others = tuple(f"{end}}}".encode() for end in OTHER_ENDS)
        cursor = b"0"
        seen = ours = 0
        for _ in range(_SCANS):
            cursor, keys = ask(b"SCAN", cursor, b"COUNT", b"%d" % (COUNT_ALL // _SCANS))
            seen += len(keys)
            ours += sum(
                key.startswith(start) and key.endswith(b"}") and not key.endswith(others)
                for key in keys
            )
            if cursor == b"0":
                return int(ours)
        # The first keys of a scan are a fair sample: they are ordered by their hash.
        keys_in_all: int = ask(b"DBSIZE")
        return int(keys_in_all * ours / max(1, seen))

    def tidy(self, cursor: str = "", limit: int = 1000, *, dry_run: bool = False) -> Tidied:
        deadline = self._commands.deadline()
        nodes = self._commands.nodes(deadline)

        def repair(name: bytes, life: int) -> bool:
            """Give a key this life, or 0 to remove it. Returns whether it still had no expiry."""
            return dry_run or self._commands.run(deadline, _TIDY, [name], [b"%d" % life]) == b"K"

        node, names, end = self._find(nodes, cursor, limit, b"", deadline)
        blobs = [name for name in names if self._blob.fullmatch(name)]
        matches = [match for name in names if (match := self._name.fullmatch(name))]
        lives = self._ask(node, [packed(b"PTTL", match[0]) for match in matches], deadline, True)
        locks = [match for match in matches if match[2]]
        owners = [packed(b"EXISTS", match[0][: -len(":lock")]) for match in locks]
        there = self._ask(node, owners, deadline, True)
        found: Counter[str] = Counter()
        ends = self._ask(node, [packed(b"PTTL", blob) for blob in blobs], deadline, True)
        for blob, life in zip(blobs, ends, strict=True):
            if life == -1 and repair(blob, LOST_EXPIRY):
                found["large values without expiry"] += 1
        for lock, owned in zip(locks, there, strict=True):
            if owned == 0 and (dry_run or self._remove(node, lock[0], deadline)):
                found["orphaned locks"] += 1
        endless = [match for match, life in zip(matches, lives, strict=True) if life == -1]
        values = self._ask(node, [packed(b"GET", match[0]) for match in endless], deadline, True)
        for match, value in zip(endless, values, strict=True):
            if not isinstance(value, bytes) or match[2]:  # a lock goes with its session
                continue
            kind, life = self._verdict(match[1].decode(), value)
            if kind and repair(match[0], life):
                found[kind] += 1
        return Tidied(found, len(matches) + len(blobs), end)

    def _verdict(self, key: str, value: bytes) -> tuple[str, int]:
        """The kind of a key without expiry, and for how many milliseconds it may stay."""
        try:
            record = unpack(key, value)
        except UnreadableRecord as error:
            return ("" if error.for_others else "unreadable records"), 0
        life = record.idle_expires_at - self._commands.now()
        return ("sessions without expiry", life) if life > 0 else ("expired sessions", 0)

    def _remove(self, node: Node, name: bytes, deadline: float) -> bool:
        return self._ask(node, [packed(b"DEL", name)], deadline, True) == [1]

    def _find(
        self, nodes: list[Node], cursor: str, limit: int, begins: bytes, deadline: float
    ) -> _Found:
        """The next names of one node."""
        match = _CURSOR.fullmatch(cursor or "0::0")
        if match is None:
            raise ValueError(f"malformed cursor: {cursor!r}")
        first, run, at = int(match[1]), match[2], match[3]
        nodes = sorted(nodes, key=lambda node: node.first)
        # If a node is gone, the nodes before or after it have its slots.
        node = next((node for node in nodes if node.first >= first), nodes[-1])
        if node.first != first:
            run, at = "", "0"
        about, answer = self._ask(
            node, [packed(b"INFO", b"server"), self._scan(at, limit, begins)], deadline
        )
        known = _RUN_ID.search(about) if isinstance(about, bytes) else None  # it may be forbidden
        now_runs = known[1].decode() if known else ""
        if run not in ("", now_runs):
            (answer,) = self._ask(node, [self._scan("0", limit, begins)], deadline)
        then, names = _answered(answer)
        if then != b"0":
            end = f"{node.first}:{now_runs}:{then.decode()}"
        else:
            later = [other.first for other in nodes if other.first > node.first]
            end = f"{later[0]}::0" if later else ""
        return _Found(node, list(dict.fromkeys(names)), end)

    def _scan(self, at: str, limit: int, begins: bytes) -> bytes:
        parts = [b"SCAN", at.encode(), b"COUNT", b"%d" % min(limit, _BATCH)]
        start = re.sub(rb"([\\*?\[\]])", rb"\\\1", self._start)
        return packed(*parts, b"MATCH", start + begins + b"*")

    def _ask(
        self, node: Node, requests: Sequence[bytes], deadline: float, needed: bool = False
    ) -> list[Any]:
        """Send these in one pipeline and return the replies, with refusals as error objects.

        With ``needed``, raises ``StoreUnavailable`` if the user lacks a right.
        """
        if not requests:
            return []
        for last in (False, True):  # the first connection may have been idle for too long
            try:
                answers = ask_all(node.pool, deadline, requests)
                for answer in answers if needed else ():
                    if isinstance(answer, NoPermissionError):
                        _answered(answer)
                return answers
            except (RedisError, OSError) as error:
                reraise_interruption(error)
                if last or not isinstance(error, RedisConnectionError):
                    node.failed()
                    detail = f"redis: SCAN: {described(error)}"
                    raise StoreUnavailable(detail) from error
        raise AssertionError("not reached")


def _answered(answer: Any) -> Any:
    if isinstance(answer, ResponseError):
        advice = hint(answer)
        raise StoreUnavailable(f"redis: {described(answer)}{advice}") from answer
    return answer
