"""`flask gsession import` of a file by somebody else: nothing is written where it should not be.

The checksums of all these files are correct, since an attacker can compute them.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flask_gsession.stores import StoreOptions
from flask_gsession.stores.files import FileBlobs
from flask_gsession.stores.memory import MemoryStore
from flask_gsession.testing import FakeClock
from tests.harness.apps import Site, SiteMaker
from tests.harness.console import Console

NAME = "0123456789abcdef" * 2
KEY = b"k" * 32
YEAR = 365 * 86_400_000

Lines = list[dict[str, Any]]


@pytest.fixture
def elsewhere(clock: FakeClock) -> Iterator[Site]:
    """The source of the export, a store in memory."""
    with Site("memory://", "", clock) as site:
        yield site


def lines_of(site: Site, tmp_path: Path, **settings: Any) -> Lines:
    """The lines of an export, without its last one."""
    file = tmp_path / "honest.jsonl"
    Console(site.store.store, clock=site.clock, **settings).done("export", str(file), "--force")
    return [json.loads(line) for line in file.read_bytes().splitlines()][:-1]


def written(lines: Lines, file: Path, records: int | None = None) -> Path:
    """A file of these lines, with a last line that is right."""
    data = b"".join(json.dumps(line).encode() + b"\n" for line in lines)
    if records is None:
        records = sum("payload" in line for line in lines)
    last = {"records": records, "sha256": hashlib.sha256(data).hexdigest()}
    end = json.dumps(last, separators=(",", ":")).encode() + b"\n"
    file.write_bytes(data + end)
    return file


@pytest.fixture
def lines(elsewhere: Site, tmp_path: Path) -> Lines:
    """A session, its pointer, and one with a large value of three frames."""
    visitor = elsewhere.visitor()
    visitor.run(lambda session: session.update(user="ada"))
    visitor.run(lambda session: session.rotate(grace=60))
    photo = io.BytesIO(b"photo" * 120_000)
    elsewhere.visitor().run(lambda session: session.attach("photo", photo))
    found = lines_of(elsewhere, tmp_path)
    assert [*("blob" in line for line in found)].count(True) == 3
    return found


def console_of(site: Site, **settings: Any) -> Console:
    return Console(site.store.store, clock=site.clock, **settings)


def assert_refused(site: Site, lines: Lines, file: Path, *why: str) -> None:
    said = console_of(site).failed("import", str(written(lines, file)))
    assert "nothing was imported" in said
    assert "Traceback" not in said
    for part in why:
        assert part in said
    assert site.stored() == {}
    assert site.inside.blobs() == {}


def large_of(lines: Lines) -> Lines:
    return [line for line in lines if "blob" in line]


BAD_NAMES = ["../../x", "/etc/x", "", "x" * 32, NAME + "\n", NAME[:-1], NAME.upper(), "..", "a\0b"]
BAD_KEYS = ["../../" + "x" * 37, "", "x" * 42, "x" * 44, "x" * 42 + "\n", "x" * 42 + "/", "é" * 43]
BAD_NUMBERS = [-1, 2**63, 2**64, 2**200, 1.5, "7", None, True, [], {}]


def test_a_name_of_a_large_value(site: Site, lines: Lines, tmp_path: Path) -> None:
    for name in BAD_NAMES:
        for line in large_of(lines):
            line["blob"] = name
        assert_refused(site, lines, tmp_path / "crafted.jsonl", "not a line of an export")


@pytest.mark.parametrize("field", ["key", "successor"])
def test_malformed_keys(site: Site, lines: Lines, tmp_path: Path, field: str) -> None:
    for key in BAD_KEYS:
        for line in lines[1:]:
            if line.get(field):
                line[field] = key
        assert_refused(site, lines, tmp_path / "crafted.jsonl", "not a line of an export")


def test_the_key_of_the_clean_up(site: Site, lines: Lines, tmp_path: Path) -> None:
    row = next(line for line in lines if "payload" in line)
    row["key"] = "flask-gsession-clean-up".ljust(43, "-")
    assert_refused(site, [lines[0], row], tmp_path / "crafted.jsonl", "not the key of a session")


@pytest.mark.parametrize(
    "field", ["version", "created_at", "idle_expires_at", "absolute_expires_at"]
)
def test_malformed_numbers(site: Site, lines: Lines, tmp_path: Path, field: str) -> None:
    rows = [line for line in lines if "payload" in line and "successor" not in line]
    for number in BAD_NUMBERS:
        crafted = [lines[0], {**rows[0], field: number}]
        assert_refused(site, crafted, tmp_path / "crafted.jsonl", "not a line of an export")


@pytest.mark.parametrize("field", ["offset", "version", "expires_at"])
def test_a_number_of_a_large_value(site: Site, lines: Lines, tmp_path: Path, field: str) -> None:
    for number in [*BAD_NUMBERS, 7]:
        if (field, number) == ("expires_at", 7):
            continue
        crafted = [{**line, field: number} if "blob" in line else line for line in lines]
        assert_refused(site, crafted, tmp_path / "crafted.jsonl")


def test_large_values_without_their_session(site: Site, lines: Lines, tmp_path: Path) -> None:
    frames = large_of(lines)
    rows = [line for line in lines if "payload" in line]
    owner = next(row for row in rows if row["key"] == frames[0]["key"])
    others = [row for row in rows if row is not owner]
    more = {**frames[-1], "offset": frames[-1]["offset"] + len(frame_of(frames[-1]))}
    for crafted in (
        [*frames],
        [*others, *frames],
        [*frames, *others, owner],
        [owner, *frames],
        [{**frame, "blob": NAME} for frame in frames] + [owner],
        [*frames, more, owner],
        [*frames[1:], owner],
        [frames[0], frames[2], owner],
        [frames[0], frames[0], owner],
        [{**frames[0], "frame": ""}, owner],
        [{**frames[0], "frame": base64.b64encode(b"x" * 999_999).decode()}, owner],
    ):
        assert_refused(site, [lines[0], *crafted], tmp_path / "crafted.jsonl")
    honest = written([lines[0], *frames, owner], tmp_path / "crafted.jsonl")
    assert console_of(site).done("import", str(honest)) == "session: 1 imported\n"


def frame_of(line: dict[str, Any]) -> bytes:
    return base64.b64decode(line["frame"])


def test_large_values_of_unreadable_sessions_are_left_out(
    make_site: SiteMaker, clock: FakeClock, tmp_path: Path
) -> None:
    with Site("memory://", "", clock, encryption_keys=[KEY]) as source:
        source.visitor().run(lambda session: session.update(large="x" * 100_000))
        crafted = written(
            lines_of(source, tmp_path, encryption_keys=[KEY]), tmp_path / "sealed.jsonl"
        )
    site = make_site()
    text = console_of(site).done("import", str(crafted), "--skip-unreadable")
    assert text == "session: 0 imported, 1 unreadable\n"
    assert site.inside.blobs() == {}


# -- times


@pytest.mark.parametrize("keys", [[], [KEY]], ids=["plain", "sealed"])
def test_times_are_capped(
    make_site: SiteMaker, clock: FakeClock, tmp_path: Path, keys: list[bytes]
) -> None:
    """Also where they were sealed by an application whose sessions live for longer."""
    week = 7 * 86_400
    with Site(
        "memory://",
        "",
        clock,
        absolute_timeout=52 * week,
        idle_timeout=52 * week,
        encryption_keys=keys,
    ) as source:
        visitor = source.visitor()
        visitor.run(lambda session: session.update(user="ada", large="x" * 100_000))
        old = visitor.another_tab()
        visitor.run(lambda session: session.rotate(grace=3600))
        lines = lines_of(source, tmp_path, encryption_keys=keys)
    site = make_site(absolute_timeout=week, encryption_keys=keys)
    console = console_of(site, absolute_timeout=week, encryption_keys=keys)
    file = written(lines, tmp_path / "crafted.jsonl")
    assert console.done("import", str(file)) == "session: 2 imported\n"
    assert console.done("import", str(file)) == "session: 0 imported, 2 there already\n"
    for cookie in (visitor.cookie, old.cookie):
        guest = site.visitor(cookie)
        assert guest.run(lambda session: (session["user"], len(session["large"]))) == (
            "ada",
            100_000,
        )
        ends = guest.run(lambda session: session.expires_at).timestamp()
        assert ends <= clock() + week
    clock.advance(week)
    assert site.visitor(visitor.cookie).run(dict) == {}


def test_a_creation_in_the_future(site: Site, lines: Lines, tmp_path: Path) -> None:
    rows = [line for line in lines if "payload" in line and "successor" not in line]
    row = rows[0]
    for field in ("created_at", "idle_expires_at", "absolute_expires_at"):
        row[field] += 10 * YEAR
    file = written([lines[0], row], tmp_path / "crafted.jsonl")
    assert console_of(site).done("import", str(file)) == "session: 1 imported\n"
    record = site.store.store.load(row["key"])
    assert record is not None
    now = int(site.clock() * 1000)
    assert record.created_at == now
    assert record.idle_expires_at == record.absolute_expires_at == now + 31 * 86_400_000


def test_times_out_of_order(site: Site, lines: Lines, tmp_path: Path) -> None:
    row = next(line for line in lines if "payload" in line)
    for crafted in (
        {**row, "idle_expires_at": row["absolute_expires_at"] + 1},
        {**row, "created_at": row["absolute_expires_at"] + 1},
    ):
        assert_refused(site, [lines[0], crafted], tmp_path / "crafted.jsonl", "can't read")


def test_plain_sessions_for_an_application_with_keys(
    make_site: SiteMaker, lines: Lines, tmp_path: Path
) -> None:
    site = make_site(encryption_keys=[KEY])
    file = written(lines, tmp_path / "crafted.jsonl")
    said = console_of(site, encryption_keys=[KEY]).failed("import", str(file))
    assert "not encrypted; SESSION_ENCRYPTION_KEYS is set" in said
    assert 'end SESSION_ENCRYPTION_KEYS with "plain"' in said
    assert site.stored() == {}
    console = console_of(site, encryption_keys=[KEY, "plain"])
    assert console.done("import", str(file)) == "session: 3 imported\n"


# -- anything


def mutated(data: bytes, dice: random.Random) -> bytes:
    """One to three accidents: of a byte, of a line, of a value."""
    for _ in range(dice.randint(1, 3)):
        rows = data.splitlines(keepends=True) or [b""]
        number = dice.randrange(len(rows))
        row = bytearray(rows[number])
        kind = dice.randrange(7)
        if kind == 0 and row:
            row[dice.randrange(len(row))] = dice.randrange(256)
        elif kind == 1:
            start = dice.randrange(len(row) + 1)
            del row[start : start + dice.randint(1, 40)]
        elif kind == 2:
            start = dice.randrange(len(row) + 1)
            row[start:start] = dice.choice(
                [b"\xff\xfe", b"\\ud800", b"[" * 5000, b'"', b"{}", b"\n", b"\0", b"9" * 400]
            )
        elif kind == 3:
            rows.insert(dice.randrange(len(rows) + 1), bytes(row))
            data = b"".join(rows)
            continue
        elif kind == 4:
            row = bytearray()
        else:
            try:
                fields = json.loads(bytes(row))
                if not isinstance(fields, dict) or not fields:
                    raise ValueError
            except ValueError:
                continue
            field = dice.choice(sorted(fields))
            values = [*BAD_NUMBERS, *BAD_NAMES, *BAD_KEYS, 0, 1, "é", "\ud800", [[]] * 10]
            if kind == 5:
                fields[field] = dice.choice(values)
            elif dice.random() < 0.5:
                del fields[field]
            else:
                fields[dice.choice(["successor", "blob", "more"])] = dice.choice(values)
            row = bytearray(json.dumps(fields).encode() + b"\n")
        rows[number] = bytes(row)
        data = b"".join(rows)
    return data


@pytest.mark.parametrize("with_files", [False, True], ids=["in the store", "in files"])
def test_files_with_any_accident(
    lines: Lines, tmp_path: Path, clock: FakeClock, with_files: bool
) -> None:
    """A clear error, or an import; never a traceback, and nothing outside of its places."""
    dice = random.Random(13)
    honest = b"".join(json.dumps(line).encode() + b"\n" for line in lines)
    file = tmp_path / "crafted.jsonl"
    place = tmp_path / "deep" / "er" / "large"
    refused = 0
    for number in range(120):
        data = mutated(honest, dice)
        records = sum(b'"payload"' in row for row in data.splitlines())
        digest = hashlib.sha256(data).hexdigest()
        last = json.dumps({"records": records, "sha256": digest}, separators=(",", ":"))
        file.write_bytes(data + last.encode() + b"\n")
        before = {path for path in tmp_path.rglob("*") if place not in path.parents}
        store = MemoryStore(StoreOptions(clock=clock))
        settings = {"spill_store": f"file://{place}"} if with_files else {}
        console = Console(store, clock=clock, **settings)
        result = console.run("import", str(file))
        assert result.exception is None or isinstance(result.exception, SystemExit), number
        assert result.exit_code in (0, 1), number
        if result.exit_code:
            refused += 1
            assert "nothing was imported" in result.stderr
            assert not store._records
            assert not store._blobs
        after = {path for path in tmp_path.rglob("*") if place not in path.parents}
        assert after - before <= {place, place.parent, place.parent.parent}
        for record in store._records.values():
            assert record.absolute_expires_at <= (clock() + 31 * 86_400) * 1000
    assert 75 < refused <= 120


def test_a_file_that_changes_during_the_import(
    lines: Lines, tmp_path: Path, clock: FakeClock
) -> None:
    file = written(lines, tmp_path / "crafted.jsonl")

    class Slow(MemoryStore):
        def load(self, key: str) -> Any:
            with file.open("r+b") as out:
                out.truncate(200)
            return super().load(key)

    said = Console(Slow(StoreOptions(clock=clock)), clock=clock).failed("import", str(file))
    assert "changed during the import" in said


@pytest.mark.parametrize("name", BAD_NAMES)
def test_the_place_of_files_refuses_such_names_itself(tmp_path: Path, name: str) -> None:
    store = MemoryStore()
    place = FileBlobs(f"file://{tmp_path}/deep/large", store)
    for call in (
        lambda: place.write_frame(name, 0, b"x", 2**41),
        lambda: place.read_frame(name, 0, 1),
        lambda: place.discard_blobs([name], 0),
        lambda: place.renew_blobs([name], 2**41),
    ):
        with pytest.raises(ValueError, match="32 hexadecimal digits"):
            call()
    assert not store._blobs
    assert not [*tmp_path.iterdir()]
