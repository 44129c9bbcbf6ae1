"""The machine and the versions behind the figures, without host name, paths and user."""

from __future__ import annotations

import os
import platform
import subprocess
from configparser import ConfigParser
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGES = ("Flask", "Werkzeug", "Flask-Session", "msgspec", "hiredis")


def environment() -> dict[str, str]:
    """Returns versions, and the kind of machine."""
    found = {
        "Python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cores": str(os.cpu_count()),
    }
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    found["Flask-GSession"] = _ours()
    return found


def _ours() -> str:
    """The version and commit of the working tree, which is measured."""
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    number = setup["metadata"]["version"]
    try:
        commit = _git("rev-parse", "--short", "HEAD")
        changed = _git("status", "--porcelain", "--untracked-files=no", "flask_gsession")
    except (OSError, subprocess.CalledProcessError):  # no git, or an unpacked archive
        return number
    return f"{number} ({commit}{', changed' if changed else ''})"


def _git(*arguments: str) -> str:
    git = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    return git.stdout.strip()


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown"
