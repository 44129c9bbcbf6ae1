"""What is installed: a wheel, built as `python -m build` does it, with nothing from the network."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

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


def test_the_wheel_holds_the_whole_package(tmp_path: Path) -> None:
    source = tmp_path / "source"
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "flask_gsession", source / "flask_gsession", ignore=ignored)
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run(
        [sys.executable, "-c", BUILD], cwd=source, env=environment, check=True, timeout=120
    )
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
        (entry_points,) = [name for name in archive.namelist() if name.endswith("entry_points.txt")]
        assert b"gsession = flask_gsession.cli:gsession" in archive.read(entry_points)
    files = [path for path in (source / "flask_gsession").rglob("*") if path.is_file()]
    assert held == {path.relative_to(source).as_posix() for path in files}
    kinds = {path.suffix for path in files}
    assert kinds == {".py", ".typed", ".lua", ".json", ".yml"}
