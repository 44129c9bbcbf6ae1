"""Large values as files: in a folder, and in a file system of fsspec, beside every store."""

from __future__ import annotations

import errno
import io
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from flask import Flask

from flask_gsession import Session
from flask_gsession.cli import gsession
from flask_gsession.errors import SettingError, StoreUnavailable
from flask_gsession.events import CleanedUp, LargeValueLost
from flask_gsession.operate.cleanup import CleanupWorker
from flask_gsession.stores import Store, StoreOptions
from flask_gsession.stores.base import Clock
from flask_gsession.stores.files import FRAME_BYTES, ORPHANS, FileBlobs
from flask_gsession.stores.memory import MemoryStore
from flask_gsession.stores.parts import Tidied
from flask_gsession.stores.wrappers import Wrapper
from flask_gsession.testing import FakeClock, StoreContract, a_blob
from tests.harness.apps import Site, SiteMaker
from tests.values.test_large_values import ENDS, PHOTO, ROWS, get, put, with_rows


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The folder of the files, which doesn't exist yet."""
    return tmp_path / "of the app" / "large"


@pytest.fixture
def site(make_site: SiteMaker, folder: Path) -> Site:
    """A site on each store in turn, with its large values in files."""
    return make_site(spill_store=f"file://{folder}")


def files(folder: Path) -> list[Path]:
    """The files of large values."""
    return sorted(path for path in folder.glob("*/*/*") if path.is_file())


def place(site: Site) -> FileBlobs:
    """The place of the large values."""
    found = site.app.extensions["gsession"][site.ext].repository.files
    assert isinstance(found, FileBlobs)
    return found


class Both(Wrapper):
    """A store whose large values are files."""

    def __init__(self, store: MemoryStore, blobs: FileBlobs) -> None:
        super().__init__(store)
        self.blobs, self.upkeep = blobs, None


@pytest.mark.parametrize("scheme", ["file", "memory"])
class TestContract(StoreContract):
    """The part of the contract on blobs."""

    @pytest.fixture(autouse=True)
    def _where(self, scheme: str, tmp_path: Path) -> Iterator[None]:
        self.url = f"{scheme}://{tmp_path}/large"
        yield
        memory = fsspec.filesystem("memory")
        if memory.exists(str(tmp_path)):
            memory.rm(str(tmp_path), recursive=True)

    def open(self, clock: Clock) -> Store:
        options = StoreOptions(clock=clock)
        store = MemoryStore(options)
        blobs = FileBlobs(self.url, store.blobs, options)
        blobs.write_frame(a_blob(), 0, b"the first", int(clock() * 1000) + 60_000)
        return Both(store, blobs)


def test_they_are_files_and_the_session_is_not(site: Site, folder: Path) -> None:
    visitor = with_rows(site, photo=PHOTO)
    sizes = [path.stat().st_size for path in files(folder)]
    assert len(sizes) == 2
    assert sum(sizes) > len(PHOTO)
    assert folder.stat().st_mode & 0o077 == 0
    assert visitor.run(lambda session: session.copy()) == {
        "rows": ROWS,
        "user": "ada",
        "photo": PHOTO,
    }
    with site.counted() as count:
        assert visitor.run(get("photo")) == PHOTO
    assert count.calls == ["load"]
    visitor.run(lambda session: session.rotate(grace=0))
    assert visitor.run(get()) == ROWS
    visitor.run(ENDS["a logout"])
    assert files(folder) == []
    assert site.inside.blobs() == {}


def test_a_large_file_is_some_of_them(site: Site, folder: Path) -> None:
    content = PHOTO * 5
    assert len(content) > FRAME_BYTES
    visitor = site.visitor()
    assert visitor.run(lambda s: s.attach("photo", io.BytesIO(content))) == len(content)
    assert len(files(folder)) == 2
    part = visitor.run(lambda s: (s.open("photo").seek(4_999_990), s.open("photo").read())[1])
    assert part == content


def test_they_are_encrypted_too(make_site: SiteMaker, folder: Path) -> None:
    for keys in ([b"k" * 32], []):
        site = make_site(spill_store=f"file://{folder}", encryption_keys=keys)
        visitor = with_rows(site)
        (file,) = files(folder)
        assert (b"A-01999" in file.read_bytes()) is (keys == [])
        assert visitor.run(get()) == ROWS
        visitor.run(ENDS["a logout"])


def test_unreferenced_values_are_cleaned_up(site: Site, folder: Path, clock: FakeClock) -> None:
    visitor = with_rows(site)
    visitor.run(put(rows=ROWS[1:]))
    with_rows(site)  # this visitor never comes back
    crashed = a_blob()
    place(site).write_frame(crashed, 0, b"frame", int(clock() * 1000) + 60_000)
    assert len(files(folder)) == 4
    expired = 0 if site.url.startswith("redis") else 1  # a real server keeps real time
    # Files are dated by the system's clock: however slow it is, they are an hour old after 3700 s.
    for seconds, live, orphans in ((1, 4, 0), (3700, 4, 2 * expired), (3600, 2, 3 * expired)):
        clock.advance(seconds)
        assert visitor.run(get()) == ROWS[1:]
        if live == 2 and expired:
            clock.advance(200)
        dry = place(site).tidy(dry_run=True)
        assert (dry.found[ORPHANS], dry.seen) == (orphans, 4)
    cursors = [""]
    removed = 0
    while cursors[-1] or len(cursors) == 1:
        step = place(site).tidy(cursors[-1], limit=1)
        removed += step.found[ORPHANS]
        cursors.append(step.cursor)
    assert removed == 3 * expired
    assert visitor.run(get()) == ROWS[1:]
    assert len(files(folder)) == 4 - removed
    with pytest.raises(ValueError, match="malformed cursor"):
        place(site).tidy("of another place")


def test_those_of_other_sessions_are_left_alone(folder: Path, clock: FakeClock) -> None:
    places = []
    for prefix in ("shop:", "admin:", ""):
        options = StoreOptions(prefix=prefix, clock=clock)
        blobs = FileBlobs(f"file://{folder}", MemoryStore(options), options)
        blobs.write_frame(a_blob(), 0, b"frame", int(clock() * 1000) + 1_000_000_000)
        places.append(blobs)
    clock.advance(3700)
    assert [blobs.tidy() for blobs in places] == [Tidied({ORPHANS: 0}, 1, "")] * 3
    places[0].write_frame(a_blob(), 0, b"frame", int(clock() * 1000))
    assert [blobs.tidy().found[ORPHANS] for blobs in places] == [1, 0, 0]
    assert len(files(folder)) == 3


def test_the_command_cleans_them_up(site: Site, folder: Path, clock: FakeClock) -> None:
    with_rows(site)
    site.visitor().run(put(rows=ROWS))
    orphan = files(folder)[0]
    site.inside.spoil(orphan.parent.name, None)
    clock.advance(3700)
    app = Flask("of the administrator")
    Session(app, store=site.store.store, spill_store=f"file://{folder}", clock=clock)
    run = app.test_cli_runner().invoke
    for option, words, count in (("--dry-run", "to be removed", 2), ("--batch=1", "removed", 1)):
        result = run(gsession, ["cleanup", option])
        assert result.exit_code == 0, result.output
        assert f"1 orphaned large value {words}" in result.output
        assert len(files(folder)) == count
    assert orphan not in files(folder)


def test_the_worker_cleans_them_up(site: Site, folder: Path, clock: FakeClock) -> None:
    with_rows(site)
    site.visitor().run(put(rows=ROWS))
    orphan = files(folder)[0]
    site.inside.spoil(orphan.parent.name, None)
    clock.advance(3700)
    app = Flask("of a worker")
    ext = Session(app, store=site.store.store, spill_store=f"file://{folder}", clock=clock)
    found: list[dict[str, int]] = []
    ext.on(CleanedUp, lambda event: found.append(event.found))
    CleanupWorker(app).run(app)
    assert [each["orphaned large values"] for each in found] == [1]
    assert orphan not in files(folder)
    assert len(files(folder)) == 1


def test_one_that_is_lost_is_absent(site: Site, folder: Path) -> None:
    for spoil, reason in (
        (lambda file: file.unlink(), "missing"),
        (lambda file: file.write_bytes(file.read_bytes()[:-1]), "truncated"),
        (lambda file: file.write_bytes(file.read_bytes()[:-1] + b"\0"), "altered"),
        (lambda file: file.write_bytes(b""), "truncated"),
    ):
        visitor = with_rows(site)
        (file,) = files(folder)
        spoil(file)
        assert visitor.run(get()) is None
        assert site.happened(LargeValueLost)[-1].reason == reason
        visitor.run(ENDS["a logout"])
        file.unlink(missing_ok=True)


def test_a_place_that_is_not_there_is_an_outage(
    site: Site, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    visitor = with_rows(site)
    away = folder.with_name("not mounted")
    folder.rename(away)
    folder.mkdir()
    assert visitor.ask(get()).status_code == 503
    assert visitor.run(get("user")) == "ada"
    assert site.happened(LargeValueLost) == []
    folder.rmdir()
    folder.write_text("something else")
    assert visitor.ask(put(rows=ROWS[1:])).status_code == 503
    assert "files: write: " in caplog.text
    assert visitor.run(lambda session: session.update(user="eve")) is None
    folder.unlink()
    away.rename(folder)
    assert visitor.run(lambda session: session.copy()) == {"rows": ROWS, "user": "eve"}


def test_a_full_disk_is_an_outage(
    site: Site, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    visitor = with_rows(site)

    def full(fs: object, path: str, data: bytes) -> None:
        Path(path).write_bytes(data[:100])
        raise OSError(errno.ENOSPC, "No space left on device", path)

    with monkeypatch.context() as patch:
        patch.setattr("flask_gsession.stores.files._write", full)
        response = visitor.ask(put(rows=ROWS[1:]))
        assert (response.status_code, response.headers["Retry-After"]) == (503, "1")
        assert "files: write: OSError: No space left on device" in caplog.text
        assert str(folder) not in caplog.text
    assert visitor.run(get()) == ROWS


WRONG: dict[str, tuple[object, str]] = {
    "no url": ("/var/lib/shop", "no URL; allowed are an fsspec URL such as file:///var/lib"),
    "unknown": ("nosuch://secret@host", "a URL with the scheme 'nosuch'; allowed are"),
    "type": (7, "of type int; allowed are an fsspec URL"),
    "class": (MemoryStore, "the class MemoryStore, not an object of it; allowed are"),
    "not installed": ("s3://key:secret@bucket", "scheme 's3', whose file system is not installed"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_place_stops_the_application(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    source, words = WRONG[what]
    monkeypatch.setitem(sys.modules, "s3fs", None)
    loaded = sys.modules["fsspec.registry"]._registry  # where another test has used it
    monkeypatch.delitem(loaded, "s3", raising=False)
    app = Flask(__name__)
    with pytest.raises(SettingError, match="SESSION_SPILL_STORE is") as error:
        Session(app, store="memory://", spill_store=source)
    assert words in str(error.value)
    assert "secret" not in str(error.value)


def test_without_fsspec_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "flask_gsession.stores.files")
    monkeypatch.setitem(sys.modules, "fsspec", None)
    app = Flask(__name__)
    with pytest.raises(SettingError, match=r"fsspec is not installed: .*flask-gsession\[fsspec\]"):
        Session(app, store="memory://", spill_store="file:///large")


def test_another_store_can_be_the_place(clock: FakeClock) -> None:
    elsewhere = MemoryStore(StoreOptions(clock=clock))
    with SiteMaker("memory://", "", clock) as make:
        site = make(spill_store=elsewhere)
        visitor = with_rows(site)
        assert (len(site.inside.blobs()), len(elsewhere._blobs)) == (0, 1)
        assert visitor.run(get()) == ROWS
        visitor.run(ENDS["a logout"])
        assert not elsewhere._blobs


def test_the_store_must_know_which_files_are_needed() -> None:
    class Least:
        create = load = save = renew = replace = delete = close = lambda *_: None

    with pytest.raises(SettingError, match="needs a SESSION_STORE with the part `blobs`"):
        Session(Flask(__name__), store=Least(), spill_store="file:///large")


def test_errors_of_any_kind_are_outages(monkeypatch: pytest.MonkeyPatch) -> None:
    blobs = FileBlobs("memory://large-errors", MemoryStore())

    def fail(*_: Any, **__: Any) -> None:
        raise LookupError("secret")

    monkeypatch.setattr(fsspec.get_filesystem_class("memory"), "cat_file", fail)
    with pytest.raises(StoreUnavailable, match=r"^files: read: LookupError$"):
        blobs.read_frame(a_blob(), 0, 10)
