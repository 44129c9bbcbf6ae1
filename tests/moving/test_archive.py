"""`flask gsession export` and `import`: sessions move between any two stores; nothing is lost."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from flask_login import LoginManager

from flask_gsession import StoreUnavailable
from flask_gsession.cli import gsession
from flask_gsession.moving.archive import BEGINNING
from flask_gsession.moving.private_file import remove_leftovers
from flask_gsession.stores import Record
from flask_gsession.stores.base import new_version
from flask_gsession.stores.memory import MemoryStore
from flask_gsession.stores.parts import Page
from flask_gsession.testing import FakeClock, HookedStore, a_record
from tests.cli.test_command import down
from tests.harness.apps import Site, SiteMaker
from tests.harness.console import ROOT, Console, struck
from tests.operate.test_cleanup import FOLDER_STORE

from .old import OldFiles

__all__ = ["down"]

KEY = b"a" * 32
OTHER_KEY = b"b" * 32


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "sessions.jsonl"


@pytest.fixture
def elsewhere(clock: FakeClock) -> Site:
    """Another store, in memory, of an application with the same secrets."""
    return Site("memory://", "", clock)


def console_of(site: Site, **settings: Any) -> Console:
    return Console(site.store.store, clock=site.clock, **settings)


def moved(source: Site, target: Site, file: Path) -> str:
    """Move all sessions. Returns the import's output."""
    console_of(source).done("export", str(file), "--force")
    return console_of(target).done("import", str(file))


def records(site: Site) -> dict[str, Record]:
    """The records of a store, by key."""
    store: Any = site.store.store
    return {record.key: record for record in store.scans.scan(limit=1000).records}


# -- there and back


def test_from_each_store_and_to_each_store(site: Site, elsewhere: Site, file: Path) -> None:
    visitors = [site.visitor() for _ in range(3)]
    for number, visitor in enumerate(visitors):
        visitor.run(lambda session, n=number: session.update(n=n, s={1, 2}))
    visitors[0].run(lambda session: session.set("code", "x", ttl=60))
    visitors[1].run(lambda session: session.rotate(grace=60))
    old = visitors[1].another_tab()
    site.clock.advance(5)
    before = records(site)
    assert len(before) == 4  # with the pointer
    assert moved(site, elsewhere, file) == "session: 4 imported\n"
    assert records(elsewhere) == before  # keys, versions, times, payloads
    guests = [elsewhere.visitor(visitor.cookie) for visitor in visitors]
    assert [guest.run(lambda session: session["n"]) for guest in guests] == [0, 1, 2]
    assert elsewhere.visitor(old.cookie).run(lambda session: session["s"]) == {1, 2}
    guests[2].run(lambda session: session.update(n=20))
    site.clock.advance(60)
    assert guests[0].run(lambda session: "code" in session) is False

    console_of(site).done("revoke", "--all", "--yes")
    assert moved(elsewhere, site, file) == "session: 3 imported\n"
    assert [visitor.run(lambda session: session.get("n")) for visitor in visitors] == [0, 1, 20]


@pytest.mark.parametrize("way", ["logout", "revocation"])
def test_dead_old_cookies_stay_dead(
    make_site: SiteMaker, clock: FakeClock, file: Path, tmp_path: Path, way: str
) -> None:
    """While an import is on, its marks move too, and so do the rosters with an epoch."""
    old = OldFiles(tmp_path / "old")
    site, target = make_site(config=old.config), Site("memory://", "", clock, config=old.config)
    for each in (site, target):
        LoginManager(each.app)
    sid, other, late = (old.add(_user_id=user) for user in ("7", "8", "7"))
    dead, alive = site.visitor(), site.visitor()
    for visitor, value in ((dead, sid), (alive, other)):
        visitor.set_cookie("session", value)
        visitor.run(dict)
    if way == "logout":
        dead.run(lambda session: session.destroy())
        old.add(sid, _user_id="7")  # an old worker wrote it back
    else:
        with site.app.app_context():
            site.ext.users.revoke_all("7")
    for app, words in ((site.app, ["export"]), (target.app, ["import"]), (target.app, ["import"])):
        result = app.test_cli_runner().invoke(gsession, [*words, str(file)])
        assert result.exit_code == 0, result.output
    end = "3 records" if way == "revocation" else "2 records"  # two marks, and the roster
    assert result.stdout == f"session_gs: 0 imported, 1 there already, {end} of old cookies\n"
    cookies = [sid] if way == "logout" else [sid, late]
    for cookie in cookies:
        guest = target.visitor()
        guest.set_cookie("session", cookie)
        assert guest.run(dict) == {}
    guest = target.visitor()
    guest.set_cookie("session", other)
    assert guest.run(lambda session: session.handle) == alive.run(lambda session: session.handle)
    target.store.close()


def test_a_session_that_a_revocation_kept(
    make_site: SiteMaker, clock: FakeClock, file: Path, tmp_path: Path
) -> None:
    """It is older than its user's revocation of all others, which is imported before it."""
    config = OldFiles(tmp_path / "old").config
    site, target = make_site(config=config), Site("memory://", "", clock, config=config)
    kept, ended = site.visitor(), site.visitor()
    for visitor in (kept, ended):
        visitor.run(lambda session: session.bind("7"))
    site.clock.advance(60)
    kept.run(lambda session: site.ext.users.revoke_others())
    for app, words in ((site.app, ["export"]), (target.app, ["import"])):
        result = app.test_cli_runner().invoke(gsession, [*words, str(file)])
        assert result.exit_code == 0, result.output
    assert "1 imported" in result.stdout
    guest = target.visitor(kept.cookie)
    assert guest.run(lambda session: session.handle) == kept.run(lambda session: session.handle)
    target.store.close()


def test_other_files_in_the_folder_stay(elsewhere: Site, file: Path) -> None:
    other = file.with_name(f"{file.name}.part")
    other.write_text("somebody else's")
    console_of(elsewhere).done("export", str(file))
    assert other.read_text() == "somebody else's"
    assert {path.name for path in file.parent.glob("*.part")} == {other.name}
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_twice_is_as_good_as_once(site: Site, elsewhere: Site, file: Path) -> None:
    visitors = [elsewhere.visitor() for _ in range(3)]
    for visitor in visitors:
        visitor.run(lambda session: session.update(a=1))
    assert moved(elsewhere, site, file) == "session: 3 imported\n"
    guest, renewed, _ = (site.visitor(visitor.cookie) for visitor in visitors)
    guest.run(lambda session: session.update(a=2))
    site.clock.advance(600)
    renewed.run(dict)
    before = records(site)
    text = console_of(site).done("import", str(file))
    assert text == "session: 0 imported, 1 changed since and kept, 2 there already\n"
    assert records(site) == before
    text = console_of(site).done("import", str(file), "--overwrite")
    assert text == "session: 0 imported, 1 overwritten, 2 there already\n"
    assert guest.run(dict) == {"a": 1}


def test_a_session_that_was_rotated_away_is_not_overwritten(
    site: Site, elsewhere: Site, file: Path
) -> None:
    visitor = elsewhere.visitor()
    visitor.run(lambda session: session.update(a=1))
    moved(elsewhere, site, file)
    guest = site.visitor(visitor.cookie)
    guest.run(lambda session: session.rotate(grace=60))
    text = console_of(site).done("import", str(file), "--overwrite")
    assert text == "session: 0 imported, 1 changed since and kept\n"
    assert site.visitor(visitor.cookie).run(lambda session: session.handle) == guest.run(
        lambda session: session.handle
    )


def test_a_pointer_overwrites_no_session(site: Site, elsewhere: Site, file: Path) -> None:
    visitor = elsewhere.visitor()
    visitor.run(lambda session: session.update(a=1))
    old = visitor.another_tab()
    moved(elsewhere, site, file)
    visitor.run(lambda session: session.rotate(grace=60))
    console_of(elsewhere).done("export", str(file), "--force")
    text = console_of(site).done("import", str(file), "--overwrite")
    assert text == "session: 1 imported, 1 changed since and kept\n"
    for cookie in (old.cookie, visitor.cookie):
        assert site.visitor(cookie).run(dict) == {"a": 1}


def test_the_expired_are_left_out(site: Site, elsewhere: Site, file: Path) -> None:
    elsewhere.visitor().run(lambda session: session.update(a=1))
    console_of(elsewhere).done("export", str(file))
    site.clock.advance(7 * 86400)
    assert console_of(site).done("import", str(file)) == "session: 0 imported, 1 expired\n"
    assert site.stored() == {}


def test_large_values_move_too(site: Site, elsewhere: Site, file: Path) -> None:
    photo, rows = bytes(range(256)) * 2500, ["a row of many"] * 5000
    visitor = site.visitor()
    visitor.run(lambda session: session.update(rows=rows, a=1))
    visitor.run(lambda session: session.attach("photo", io.BytesIO(photo)))  # three frames
    assert moved(site, elsewhere, file) == "session: 1 imported\n"
    guest = elsewhere.visitor(visitor.cookie)
    assert guest.run(dict) == {"rows": rows, "a": 1, "photo": photo}
    site.clock.advance(3600)
    guest.run(lambda session: session.update(a=2))
    for options, expected in ((), 2), (("--overwrite",), 1):
        # None of them shortens the life of a session in use.
        console_of(elsewhere).done("import", str(file), *options)
        site.clock.advance(1000)
        assert guest.run(lambda session: (session["a"], session["photo"])) == (expected, photo)
    site.clock.advance(3600)
    assert guest.run(dict) == {"rows": rows, "a": 1, "photo": photo}
    console_of(site).done("revoke", "--all", "--yes")
    assert moved(elsewhere, site, file) == "session: 1 imported\n"
    assert visitor.run(dict) == {"rows": rows, "a": 1, "photo": photo}


def test_a_large_value_that_is_lost_is_said_and_ends_with_1(elsewhere: Site, file: Path) -> None:
    for _ in range(2):
        elsewhere.visitor().run(lambda session: session.update(a=1, large="x" * 100_000))
    store: Any = elsewhere.store.store
    store.blobs.discard_blobs([next(iter(store._blobs))], 0)
    result = console_of(elsewhere).run("export", str(file))
    assert (result.exit_code, result.stdout) == (1, "session: 2 records exported\n")
    assert "1 session exported without a large value that is lost" in result.stderr


def test_unreadable_records_are_reported_with_exit_status_1(file: Path) -> None:
    class Broken(MemoryStore):
        def scan(self, cursor: str = "", limit: int = 200, begins: str = "") -> Page:
            return super().scan(cursor, limit, begins)._replace(unreadable=["x" * 43])

    result = Console(Broken()).run("export", str(file))
    assert (result.exit_code, result.stdout) == (1, "session: 0 records exported\n")
    assert "could not read 1 record; left out of the export" in result.stderr


def test_a_dry_run_makes_no_file(elsewhere: Site, file: Path, tmp_path: Path) -> None:
    visitor = elsewhere.visitor()
    visitor.run(lambda session: session.update(a=1, large="x" * 100_000))
    console_of(elsewhere).done("export", str(file))
    path = tmp_path / "new" / "sessions.sqlite3"
    console = Console(f"sqlite:///{path}", clock=elsewhere.clock)
    assert console.done("import", str(file), "--dry-run") == "session: 1 to be imported\n"
    assert not path.parent.exists()
    assert console.done("import", str(file)) == "session: 1 imported\n"
    assert console.done("import", str(file), "--dry-run").endswith(" 1 there already\n")


def test_a_dry_run(site: Site, elsewhere: Site, file: Path) -> None:
    for _ in range(2):
        elsewhere.visitor().run(lambda session: session.update(a=1))
    console_of(elsewhere).done("export", str(file))
    console = console_of(site)
    assert console.done("import", str(file), "--dry-run") == "session: 2 to be imported\n"
    assert site.stored() == {}
    console.done("import", str(file))
    report = json.loads(console.done("import", str(file), "--dry-run", "--json"))
    assert report == {"session": "session", "dry_run": True, "records": {"there already": 2}}


def test_through_a_pipe(elsewhere: Site, make_site: SiteMaker) -> None:
    elsewhere.visitor().run(lambda session: session.update(a=1))
    result = console_of(elsewhere).run("export", "-")
    assert result.stderr.endswith("session: 1 record exported\n")
    site = make_site()
    text = console_of(site).done("import", "-", input=result.stdout_bytes)
    assert text == "session: 1 imported\n"


# -- encrypted ones


def test_encrypted_sessions_need_their_key(
    make_site: SiteMaker, clock: FakeClock, file: Path
) -> None:
    source = Site("memory://", "", clock, encryption_keys=[KEY])
    visitor = source.visitor()
    visitor.run(lambda session: session.update(name="a canary"))
    console_of(source, encryption_keys=[KEY]).done("export", str(file))
    assert b"canary" not in file.read_bytes()

    target = make_site(encryption_keys=[OTHER_KEY, KEY])
    for settings in ({}, {"encryption_keys": [OTHER_KEY]}):
        console = console_of(target, **settings)
        complaint = console.failed("import", str(file))
        assert "can't read 1 of 1 record" in complaint
        assert "unknown encryption key" in complaint
        assert "nothing was imported" in complaint
        text = console.done("import", str(file), "--skip-unreadable")
        assert text == "session: 0 imported, 1 unreadable\n"
        assert target.stored() == {}
    console = console_of(target, encryption_keys=[OTHER_KEY, KEY])
    assert console.done("import", str(file)) == "session: 1 imported\n"
    assert target.visitor(visitor.cookie).run(dict) == {"name": "a canary"}


# -- files that are not well


@pytest.fixture
def exported(elsewhere: Site, file: Path) -> Path:
    """An export of five sessions."""
    for number in range(5):
        elsewhere.visitor().run(lambda session, n=number: session.update(n=n))
    console_of(elsewhere).done("export", str(file))
    return file


def lines_cut(data: bytes) -> Iterator[bytes]:
    lines = data.splitlines(keepends=True)
    yield from (b"".join(lines[:number]) for number in range(len(lines)))
    yield data[:-1]
    yield data[: len(data) // 2]


def test_a_truncated_file(exported: Path, site: Site) -> None:
    console = console_of(site)
    for cut in lines_cut(exported.read_bytes()):
        exported.write_bytes(cut)
        complaint = console.failed("import", str(exported))
        problem = "truncated" if cut else "the file is empty"
        assert f"{problem}; nothing was imported" in complaint
    assert "standard input: the file is empty" in console.failed("import", "-", input="")
    assert site.stored() == {}


@pytest.mark.parametrize(
    ("alter", "complaint"),
    [
        (lambda data: data.replace(b'"version":', b'"version": '), "checksum mismatch"),
        (lambda data: b"".join(data.splitlines(True)[:2] + data.splitlines(True)[3:]), "checksum"),
        (lambda data: data + b"\n", "data after the last line"),
        (lambda data: data * 2, "data after the last line"),
        (lambda data: data.replace(b'gsession":1', b'gsession":2'), "format 2"),
        (lambda data: b"PK\3\4 what is this?\n", "not a line of an export"),
        (lambda data: b"\0" * 5000 + b"\n", "not a line of an export"),
        (lambda data: data.replace(b'"key":"', b'"key":"../../', 1), "not a line of an export"),
        (lambda data: data.replace(b'"created_at":1', b'"created_at":"x1', 1), "not a line of"),
        (lambda data: data.replace(b'"key"', b'"payload"', 1), "not a line of an export"),
    ],
    ids=["space", "line", "after", "twice", "format", "foreign", "zeros", "key", "type", "field"],
)
def test_an_altered_file(
    exported: Path, site: Site, alter: Callable[[bytes], bytes], complaint: str
) -> None:
    exported.write_bytes(alter(exported.read_bytes()))
    said = console_of(site).failed("import", str(exported))
    assert complaint in said
    assert "nothing was imported" in said
    assert site.stored() == {}


def test_a_record_of_another_session(exported: Path, site: Site) -> None:
    """With a checksum that is right: payloads are bound to their key."""
    first, one, *rest, last = exported.read_bytes().splitlines(keepends=True)
    row = json.loads(one)
    row["key"] = json.loads(rest[0])["key"]
    lines = [first, json.dumps(row).encode() + b"\n", *rest]
    end = {"records": 5, "sha256": hashlib.sha256(b"".join(lines)).hexdigest()}
    text = json.dumps(end, separators=(",", ":")).encode() + b"\n"
    assert len(text) == len(last)
    exported.write_bytes(b"".join([*lines, text]))
    assert "corrupt: 1" in console_of(site).failed("import", str(exported))
    assert site.stored() == {}


def test_files_that_cannot_be(
    elsewhere: Site, tmp_path: Path, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    console = console_of(elsewhere)
    assert "No such file" in console.failed("import", str(file))
    assert "No such file" in console.failed("export", str(tmp_path / "no" / "folder"))
    assert console.run("import", str(tmp_path)).exit_code == 2
    file.write_text("mine")
    assert "use --force to replace it" in console.failed("export", str(file), status=2)
    assert file.read_text() == "mine"
    file.chmod(0o644)
    console.done("export", str(file), "--force")
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert "is not a regular file" in console.failed("export", "/dev/null", "--force", status=2)

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    before = file.read_bytes()
    assert "No space left" in console.failed("export", str(file), "--force")
    assert file.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == [file.name]


# -- interrupted, or without a store


class Unsteady(MemoryStore):
    """Fails at the fourth page, or the fourth write."""

    failure: BaseException | None = None
    times = 1

    def _strike(self) -> None:
        self.calls = getattr(self, "calls", 0) + 1
        if self.failure is not None and self.calls >= 4 and self.times:
            self.times -= 1
            raise self.failure

    def scan(self, cursor: str = "", limit: int = 200, begins: str = "") -> Page:
        self._strike()
        return super().scan(cursor, 1, begins)

    def create(self, record: Record) -> None:
        self._strike()
        super().create(record)


@pytest.mark.parametrize(
    ("failure", "times", "status"),
    [(KeyboardInterrupt(), 1, 130), (StoreUnavailable("no"), 9, 1), (StoreUnavailable("no"), 2, 0)],
    ids=["ctrl-c", "outage", "hiccup"],
)
def test_an_interrupted_export(
    exported: Path, clock: FakeClock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    failure: BaseException, times: int, status: int,
) -> None:  # fmt: skip
    monkeypatch.setattr("flask_gsession.repository.scanning._PAUSES", (0, 0))
    store = Unsteady()
    console = Console(store, clock=clock)
    console.done("import", str(exported))
    store.calls, store.failure, store.times = 0, failure, times
    target = tmp_path / "new.jsonl"
    result = console.run("export", str(target))
    assert result.exit_code == status
    assert target.exists() is (status == 0)
    assert not list(tmp_path.glob("*.part"))
    if status:
        assert f"after 3 records; {target} not written" in result.stderr
        store.failure = None
        console.done("export", str(target))
    assert "5 " in console.done("import", str(target), "--dry-run")


@pytest.mark.parametrize(
    ("failure", "times", "status"),
    [(KeyboardInterrupt(), 1, 130), (StoreUnavailable("no"), 9, 1), (StoreUnavailable("no"), 2, 0)],
    ids=["ctrl-c", "outage", "hiccup"],
)
def test_an_interrupted_import(
    exported: Path, clock: FakeClock, elsewhere: Site, monkeypatch: pytest.MonkeyPatch,
    failure: BaseException, times: int, status: int,
) -> None:  # fmt: skip
    monkeypatch.setattr("flask_gsession.repository.scanning._PAUSES", (0, 0))
    store = Unsteady()
    store.failure, store.times = failure, times
    console = Console(store, clock=clock)
    result = console.run("import", str(exported))
    assert result.exit_code == status
    if status:
        assert "after 3 records (continue with --skip 3)" in result.stderr
        assert len(store._records) == 3
        store.failure = None
        ended = next(iter(store._records))
        store.delete(ended)
        assert console.done("import", str(exported), "--skip", "3") == "session: 2 imported\n"
        assert ended not in store._records  # a session that ended since stays ended
        assert "1 imported, 4 there already" in console.done("import", str(exported))
    assert store._records == {**records(elsewhere)}


def test_a_store_that_is_down(down: str, exported: Path, tmp_path: Path) -> None:
    console = Console(down, store_timeout=0.2)
    target = tmp_path / "new.jsonl"
    assert "the store failed" in console.failed("export", str(target))
    assert "the store failed" in console.failed("import", str(exported))
    assert [path.name for path in tmp_path.glob("*.jsonl*")] == [exported.name]


def test_to_a_store_that_cannot_scan(exported: Path, tmp_path: Path, clock: FakeClock) -> None:
    console = Console(FOLDER_STORE.FolderStore(tmp_path / "folder", clock=clock), clock=clock)
    assert console.done("import", str(exported)) == "session: 5 imported\n"
    assert console.done("import", str(exported)) == "session: 0 imported, 5 there already\n"
    assert "can't list its sessions" in console.failed("export", str(tmp_path / "new"))


def test_an_import_beside_a_request(exported: Path, clock: FakeClock) -> None:
    """A session that is created between the import's read and its write stays."""
    store = HookedStore(MemoryStore())
    console = Console(store, clock=clock)
    key = json.loads(exported.read_bytes().splitlines()[1])["key"]

    def be_quicker() -> None:
        row = json.loads(exported.read_bytes().splitlines()[1])
        store.store.create(
            Record(
                row["key"], new_version(), row["created_at"], row["idle_expires_at"],
                row["absolute_expires_at"], b"quicker",
            )
        )  # fmt: skip

    store.before("create", be_quicker)
    text = console.done("import", str(exported))
    assert text == "session: 4 imported, 1 changed since and kept\n"
    found = store.store.load(key)
    assert found is not None
    assert found.payload == b"quicker"


EXPORT = """
import sys, time
from tests.harness.console import Console
from flask_gsession.stores.sqlite import SQLiteStore

store = SQLiteStore(sys.argv.pop(1))
scan = store.scans.scan

def slow(cursor="", limit=200, begins=""):
    if cursor:
        print("begun", flush=True)
        time.sleep(120)  # until it is struck
    return scan(cursor, 5, begins)

store.scans.scan = slow
console = Console(store)
from flask_gsession.cli import gsession
with console.app.app_context():
    gsession()
"""


def test_leftovers_of_a_killed_export(sqlite_url: str, file: Path) -> None:
    console = Console(sqlite_url)
    store: Any = console.ext.store(console.app)
    for _ in range(10):
        store.create(a_record(time.time))
    with subprocess.Popen(
        [sys.executable, "-c", EXPORT, str(store.path), "export", str(file)],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        assert process.stdout.readline() == b"begun\n"
        parts = list(file.parent.glob(".*.part"))
        beside = console.run("export", str(file))
        left = list(file.parent.glob(".*.part"))
        process.kill()
    assert beside.exit_code == 0
    assert left == parts  # somebody was at it
    (part,) = parts
    alike = [part.with_name(name) for name in (".sessions.jsonl.part", f"{part.name}.part")]
    for path in alike:
        path.write_bytes(file.read_bytes())
    file.unlink()
    alike.append(part.with_name(part.name[:-13] + "abcdefgh.part"))
    alike[-1].write_text("somebody else's")
    link = part.with_name(part.name[:-13] + "01234567.part")
    link.symlink_to(file.parent / "nowhere")
    result = console.run("export", str(file))
    assert result.exit_code == 0
    assert f"Removed {part}, left behind by an export that was killed\n" in result.stderr
    assert set(file.parent.glob(".*.part")) == {*alike, link}


def test_an_export_into_a_folder_that_cannot_be_listed(
    sqlite_url: str, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Path) -> Iterator[Path]:
        raise PermissionError

    console = Console(sqlite_url)
    monkeypatch.setattr(Path, "iterdir", refuse)
    assert console.run("export", str(file)).exit_code == 0
    assert file.exists()


def test_an_export_that_is_taken_for_a_leftover(
    elsewhere: Site, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another one looks at its file before that is locked."""
    removed: list[str] = []
    make = tempfile.mkstemp

    def made(*arguments: Any) -> tuple[int, str]:
        descriptor, name = make(*arguments)
        if len(removed) < 2:
            removed.append(name)
            remove_leftovers(file, BEGINNING, print)
        return descriptor, name

    monkeypatch.setattr(tempfile, "mkstemp", made)
    console_of(elsewhere).done("export", str(file))
    assert len(removed) == 2
    assert [path.name for path in file.parent.iterdir()] == [file.name]


@pytest.mark.parametrize(
    ("to", "how"),
    [
        ("sqlite", signal.SIGINT),
        ("sqlite", signal.SIGKILL),
        ("redis", signal.SIGINT),
        ("mongodb", signal.SIGINT),
    ],
)
def test_a_real_process_that_is_struck(
    request: pytest.FixtureRequest, store_prefix: str, file: Path, to: str, how: signal.Signals
) -> None:
    source = Site("memory://", "", time.time)
    for number in range(100):
        source.visitor().run(lambda session, n=number: session.update(n=n))
    console_of(source).done("export", str(file))
    url = request.getfixturevalue(f"{to}_url")
    complaint = struck(url, store_prefix, how, "create", 5, "import", str(file))
    if how is signal.SIGINT:
        assert "--skip" in complaint
    with SiteMaker(url, store_prefix, time.time) as make:
        console = console_of(make())
        report = json.loads(console.done("import", str(file), "--json"))["records"]
        assert report["there already"] >= 5
        assert report["imported"] + report["there already"] == 100
        assert report["imported"] > 0
        assert len(make().stored()) == 100
