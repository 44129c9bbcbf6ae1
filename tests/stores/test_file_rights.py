"""Files that hold sessions are their owner's only, also where somebody made them before."""

from __future__ import annotations

import os
import sqlite3
import stat
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from flask_gsession.errors import SettingError, StoreUnavailable
from flask_gsession.operate.health import check_store
from flask_gsession.stores.files import FileBlobs
from flask_gsession.stores.memory import MemoryStore
from flask_gsession.stores.sqlite import SQLiteStore
from flask_gsession.testing import a_blob, a_record

SOMEBODY, ME = 12_345, 23_456  # users
LATER = 2**41  # milliseconds


@pytest.fixture(autouse=True)
def usual_umask() -> Iterator[None]:
    before = os.umask(0o022)
    yield
    os.umask(before)


@pytest.fixture
def as_a_user(monkeypatch: pytest.MonkeyPatch) -> int:
    """The process is not root's, as in production; the real user still may do everything."""
    monkeypatch.setattr(os, "geteuid", lambda: ME)
    return ME


def give(path: Path, monkeypatch: pytest.MonkeyPatch, uid: int) -> None:
    """Let the file belong to this user, as far as `os.stat` says."""
    real, name = os.stat, str(path)

    def look(path: Any, *args: Any, **options: Any) -> os.stat_result:
        found = real(path, *args, **options)
        if not isinstance(path, int) and os.fspath(path) == name:
            return os.stat_result([*found[:4], uid, *found[5:10]])
        return found

    monkeypatch.setattr(os, "stat", look)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def a_file(folder: Path, rights: int) -> Path:
    """An SQLite file that another program made."""
    path = folder / "sessions.sqlite3"
    with closing(sqlite3.connect(path)) as db:
        db.execute("PRAGMA journal_mode=WAL")
    path.chmod(rights)
    return path


# -- SQLite


@pytest.mark.parametrize("rights", [0o644, 0o666, 0o640, 0o604, 0o777])
def test_an_open_file_is_closed_to_others(
    tmp_path: Path, rights: int, caplog: pytest.LogCaptureFixture
) -> None:
    path = a_file(tmp_path, rights)
    store = SQLiteStore(path)
    store.create(a_record(time.time))
    assert not any(mode(file) & 0o077 for file in tmp_path.iterdir())
    assert f"was open to others (mode {rights:o})" in caplog.text
    store.close()


def test_files_beside_the_database_are_secured_too(tmp_path: Path) -> None:
    path = tmp_path / "sessions.sqlite3"
    SQLiteStore(path).create(a_record(time.time))
    first = sqlite3.connect(path)  # keeps the files beside the database
    first.execute("SELECT count(*) FROM gsession").fetchone()
    beside = [path.with_name(f"{path.name}-{end}") for end in ("wal", "shm")]
    for file in beside:
        file.chmod(0o666)
    second = SQLiteStore(path)
    assert second.load("k" * 43) is None
    assert [mode(file) for file in beside] == [0o600, 0o600]
    first.close()
    second.close()


def test_a_file_of_ours_is_left_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(2):
        store = SQLiteStore(tmp_path / "sessions.sqlite3")
        store.create(a_record(time.time))
        store.close()
    assert caplog.text == ""


@pytest.mark.parametrize("end", ["", "-wal"])
def test_a_file_of_another_user_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, as_a_user: int, end: str
) -> None:
    path = a_file(tmp_path, 0o666)
    for part in (path, path.with_name(f"{path.name}-wal")):
        part.touch()
        part.chmod(0o666)
        give(part, monkeypatch, SOMEBODY if part.name.endswith(end or "3") else ME)
    store = SQLiteStore(path)
    with pytest.raises(SettingError, match=rf"{end} belongs to another user \(uid 12345; this"):
        store.create(a_record(time.time))
    assert mode(path) == (0o666 if not end else 0o600)


def test_root_looks_after_the_files_of_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An administrator uses the command as root."""
    path = a_file(tmp_path, 0o600)
    give(path, monkeypatch, SOMEBODY)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    store = SQLiteStore(path)
    store.create(a_record(time.time))
    store.close()


def test_an_open_file_of_root_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, as_a_user: int
) -> None:
    path = a_file(tmp_path, 0o664)
    give(path, monkeypatch, 0)
    with pytest.raises(SettingError, match=r"open to others \(mode 664\) and belongs to root"):
        SQLiteStore(path).create(a_record(time.time))


def test_a_link_of_another_user_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, as_a_user: int
) -> None:
    aim = tmp_path / "elsewhere.sqlite3"
    link = tmp_path / "sessions.sqlite3"
    link.symlink_to(aim)
    give(link, monkeypatch, SOMEBODY)
    with pytest.raises(SettingError, match=r"symbolic link.*: use the path of the file"):
        SQLiteStore(link).create(a_record(time.time))


def test_a_link_of_ours_is_followed(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    aim = a_file(tmp_path / "disk", 0o644)
    link = tmp_path / "sessions.sqlite3"
    link.symlink_to(aim)
    store = SQLiteStore(link)
    store.create(a_record(time.time))
    assert {mode(file) for file in aim.parent.iterdir()} == {0o600}
    store.close()


def test_a_file_system_without_rights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = a_file(tmp_path, 0o666)
    monkeypatch.setattr(os, "chmod", lambda *_: None)
    store = SQLiteStore(path)
    store.create(a_record(time.time))
    assert "its file system keeps no permissions" in caplog.text
    found = {each.check: each.severity for each in check_store(store)}
    assert found["file permissions"] == "error"
    store.close()


def test_a_folder_for_everybody_is_warned_of_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "shared"
    folder.mkdir()
    folder.chmod(0o777)
    store = SQLiteStore(folder / "sessions.sqlite3")
    for _ in range(2):
        store.create(a_record(time.time))
        store.close()
    assert caplog.text.count("Every user of this machine can replace") == 1
    folder.chmod(0o1777)
    caplog.clear()
    other = SQLiteStore(folder / "sessions.sqlite3")
    other.create(a_record(time.time))
    assert caplog.text == ""
    other.close()


# -- large values


@pytest.fixture
def place(tmp_path: Path) -> FileBlobs:
    """A folder that a deployment made, with the usual rights."""
    folder = tmp_path / "large"
    folder.mkdir(0o755)
    return FileBlobs(f"file://{folder}", MemoryStore())


def put(place: FileBlobs, name: str | None = None) -> str:
    name = name or a_blob()
    place.write_frame(name, 0, b"a frame", LATER)
    place.write_frame(name, 7, b"another", LATER)
    return name


def test_files_in_an_open_folder_are_private(place: FileBlobs, tmp_path: Path) -> None:
    name = put(place)
    made = list((tmp_path / "large").rglob("*"))
    assert len(made) == 5
    assert {mode(path) for path in made if path.is_dir()} == {0o700}
    assert {mode(path) for path in made if path.is_file()} == {0o600}
    assert place.read_frame(name, 7, 7) == b"another"


def test_folders_from_before_are_closed(place: FileBlobs, tmp_path: Path) -> None:
    name = put(place)
    (folder,) = (tmp_path / "large").glob("*.*")
    folder.chmod(0o755)
    (folder / name).chmod(0o755)
    (finding,) = place.check()
    assert (finding.severity, finding.check) == ("error", "folder of large values")
    assert "chmod -R go-rwx" in finding.advice
    put(place, name)
    assert mode(folder) == mode(folder / name) == 0o700
    assert [finding.severity for finding in place.check()] == ["ok"]


def test_a_folder_that_others_may_write_to_is_found(place: FileBlobs, tmp_path: Path) -> None:
    put(place)
    (tmp_path / "large").chmod(0o777)
    found = check_store(MemoryStore(), blobs=place)
    assert [each.found for each in found if each.check == "folder of large values"] == ["777"]


@pytest.mark.parametrize("stranger", ["link", "user"])
def test_a_folder_of_another_user_is_refused(
    place: FileBlobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stranger: str
) -> None:
    name = a_blob()
    folder = tmp_path / "large" / f"gsession%3A.{name[:2]}"
    if stranger == "link":
        (tmp_path / "theirs").mkdir()
        folder.symlink_to(tmp_path / "theirs")
    else:
        folder.mkdir()
        monkeypatch.setattr(os, "geteuid", lambda: ME)
        give(folder, monkeypatch, SOMEBODY)
    with pytest.raises(StoreUnavailable, match=r"symbolic link|another user"):
        place.write_frame(name, 0, b"a frame", LATER)
    assert not [*folder.iterdir()]


def test_a_planted_link_in_the_place_of_a_file_is_not_followed(
    place: FileBlobs, tmp_path: Path
) -> None:
    name = put(place)
    (file,) = (tmp_path / "large").glob("*/*/000000000000")
    file.unlink()
    aim = tmp_path / "theirs"
    aim.write_text("before")
    file.symlink_to(aim)
    with pytest.raises(StoreUnavailable):
        place.write_frame(name, 0, b"a frame", LATER)
    assert aim.read_text() == "before"
