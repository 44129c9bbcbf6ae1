"""Simulates a system without POSIX, such as Windows, in a separate process."""

import subprocess
import sys
from pathlib import Path

WITHOUT_POSIX = """
import os, select, signal, socket, sys

for module in ("fcntl", "resource", "pwd", "grp", "termios"):
    sys.modules[module] = None
for module, names in (
    (os, "fork forkpty register_at_fork getuid geteuid getgid getegid chown fchown fchmod lchown "
         "O_NOFOLLOW O_NONBLOCK O_DIRECTORY O_CLOEXEC getloadavg sched_getaffinity killpg"),
    (select, "poll epoll"),
    (socket, "AF_UNIX SO_REUSEPORT"),
    (signal, "SIGALRM SIGHUP SIGUSR1 SIGUSR2 SIGKILL pthread_sigmask alarm setitimer"),
):
    for name in names.split():
        if hasattr(module, name):
            delattr(module, name)
open_file = os.open

def open_no_folder(path, *arguments, **options):
    if os.path.isdir(path):
        raise PermissionError(13, "Permission denied")
    return open_file(path, *arguments, **options)

os.open = open_no_folder
"""

EVERY_MODULE = """
import importlib, pkgutil
import flask_gsession

for module in pkgutil.walk_packages(flask_gsession.__path__, "flask_gsession."):
    importlib.import_module(module.name)
"""

A_SHOP = """
import logging, sys
from flask import Flask, session
from flask_gsession import Session
from flask_gsession.cli import gsession

url, folder = sys.argv[1:]
app = Flask("shop", instance_path=folder)
app.config.update(
    SECRET_KEY="k" * 32, SESSION_STORE=url, SESSION_SPILL_BYTES=1000,
    SESSION_SPILL_STORE="file://" + folder + "/large",
)
Session(app)

@app.post("/<name>")
def put(name):
    session[name] = name * 10_000
    with session.lock():
        return {"keys": sorted(session)}

@app.get("/<name>")
def read(name):
    return session[name]

client = app.test_client()
assert client.post("/a").status_code == 200
assert client.post("/b").json == {"keys": ["a", "b"]}
assert client.get("/a").text == "a" * 10_000
runner = app.test_cli_runner()
exported = runner.invoke(gsession, ["export", folder + "/sessions.export"])
assert exported.exit_code == 0, exported.output
checked = runner.invoke(gsession, ["doctor"])
assert "Other users may" not in checked.output, checked.output
"""


def run(code: str, *arguments: str) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", WITHOUT_POSIX + code, *arguments],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_every_module_is_imported() -> None:
    run(EVERY_MODULE)


def test_sessions_and_large_values_are_kept_and_exported(store_url: str, tmp_path: Path) -> None:
    run(A_SHOP, store_url, str(tmp_path))
