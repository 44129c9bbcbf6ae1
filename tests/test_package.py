"""A wheel, built as by `make dist` and installed without the network."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
import venv
import zipfile
from collections.abc import Iterator
from email.parser import Parser
from importlib.metadata import Distribution, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.harness.servers import RedisServer

ROOT = Path(__file__).parent.parent
# The wheel is made of the source distribution, so that has all of it, too.
BUILD = """
import os, shutil
from setuptools import build_meta
archive = build_meta.build_sdist("..")
shutil.unpack_archive(f"../{archive}", "..")
os.chdir("../" + archive.removesuffix(".tar.gz"))
build_meta.build_wheel("..")
"""
# The visit that the README shows, and a logout.
VISIT = """
import flask_gsession
from app import app

assert flask_gsession.__file__.startswith({environment!r}), flask_gsession.__file__
client = app.test_client()
print(client.post("/cart/mug").json, client.post("/cart/lamp").json, client.post("/logout").json)
print(client.post("/cart/cup").json)
"""


def run(*command: str | Path, cwd: Path) -> str:
    """The output of a command, which sees only the packages of its own environment."""
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("PYTHON")
    }
    done = subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel, the source distribution, and their `source`."""
    folder = tmp_path_factory.mktemp("dist")
    source = folder / "source"
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "flask_gsession", source / "flask_gsession", ignore=ignored)
    for name in ("setup.cfg", "pyproject.toml", "MANIFEST.in", "README.md", "CHANGELOG.md"):
        shutil.copy(ROOT / name, source)
    shutil.copy(ROOT / "LICENSE", source)
    run(sys.executable, "-c", BUILD, cwd=source)
    return folder


@pytest.fixture(scope="module")
def wheel(built: Path) -> Path:
    (found,) = built.glob("*.whl")
    return found


def needed(dist: Distribution, extra: str = "") -> Iterator[Distribution]:
    """The distributions that one needs, and those that they need."""
    for line in dist.requires or []:
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
            found = distribution(requirement.name)
            yield found
            for inner in ["", *requirement.extras]:
                yield from needed(found, inner)


def environment(folder: Path, wheel: Path, extra: str = "") -> Path:
    """The Python of an environment with only the wheel and the packages that its metadata requires.

    The wheel's dependencies are linked from the environment of the tests, so no network is needed.
    """
    venv.create(folder, symlinks=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "wheel")
    (info,) = (folder / "wheel").glob("*.dist-info")
    for dist in needed(Distribution.at(info), extra):
        for name in {file.parts[0] for file in dist.files or []} - {"..", "__pycache__"}:
            if not (packages / name).exists():
                (packages / name).symlink_to(Path(str(dist.locate_file(name))))
    wanted = f"{wheel}[{extra}]" if extra else str(wheel)
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check"]
    run(*pip, "install", "--quiet", "--no-index", wanted, cwd=folder)
    return python


def test_the_wheel_holds_the_whole_package(built: Path, wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
        (entry_points,) = [name for name in archive.namelist() if name.endswith("entry_points.txt")]
        assert b"gsession = flask_gsession.cli:gsession" in archive.read(entry_points)
    source = built / "source"
    files = [path for path in (source / "flask_gsession").rglob("*") if path.is_file()]
    assert held == {path.relative_to(source).as_posix() for path in files}
    kinds = {path.suffix for path in files}
    assert kinds >= {".py", ".typed", ".lua", ".json", ".yml"}


def test_the_metadata_is_complete(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        metadata = Parser().parsestr(archive.read(name).decode())
        assert name.replace("METADATA", "licenses/LICENSE") in archive.namelist()
    for field in ("Summary", "Author", "Keywords", "Classifier"):
        assert metadata[field], field
    assert metadata["License-Expression"] == "MIT"
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert metadata.get_payload() == (ROOT / "README.md").read_text(encoding="utf-8")
    oldest = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["mypy"]["python_version"]
    assert metadata["Requires-Python"] == f">={oldest}"
    # Each extra that the pages name is one that can be installed.
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages)
    named = re.findall(r"(?:flask-gsession|pip install ['\"]?\.)\[([\w,]+)\]", text)
    assert len(named) > 3
    extras = set(metadata.get_all("Provides-Extra") or [])
    assert {extra for names in named for extra in names.split(",")} <= extras


@pytest.mark.parametrize("extra", ["", pytest.param("redis", marks=pytest.mark.long)])
def test_the_quickstart_runs_from_the_wheel(
    extra: str, wheel: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    python = environment(tmp_path / "environment", wheel, extra)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    code = readme.partition("```python\n")[2].partition("```")[0]
    if extra:
        server: RedisServer = request.getfixturevalue("own_redis")
        assert "redis://localhost:6379/0" in readme
        setting = f'app.config["SESSION_STORE"] = {server.url!r}\n'
        code = code.replace("Session(app)", setting + "Session(app)")
    (tmp_path / "app.py").write_text(code, encoding="utf-8")
    visit = VISIT.format(environment=str(tmp_path / "environment"))
    printed = run(python, "-c", visit, cwd=tmp_path)
    assert printed == "{'items': 1} {'items': 2} {}\n{'items': 1}\n"
    assert (tmp_path / "instance" / "gsession.sqlite3").exists() is not bool(extra)
    listed = run(python, "-m", "flask", "gsession", "list", "--json", cwd=tmp_path)
    assert len(listed.splitlines()) == 1
