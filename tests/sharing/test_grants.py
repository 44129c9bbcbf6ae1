"""Access to a server of sessions: mutual TLS, tokens, Unix sockets, and nobody by default."""

from __future__ import annotations

import hashlib
import os
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from flask import Flask

from flask_gsession import Session
from flask_gsession.cli import gsession
from flask_gsession.errors import SettingError, StoreUnavailable
from flask_gsession.events import AccessDenied, Events
from flask_gsession.sharing.grants import FULL_ACCESS, Grant, Grants, GrantsFile, read_grants
from flask_gsession.sharing.introspection import introspection_blueprint
from flask_gsession.sharing.server import Server, check_address
from flask_gsession.sharing.store_service import StoreService
from flask_gsession.stores import StoreOptions, open_store
from flask_gsession.stores.remote.address import CertificateFiles, Certificates
from flask_gsession.testing import a_record
from tests.harness.apps import until
from tests.harness.certificates import Authority
from tests.harness.sharing import serving
from tests.harness.topologies import TCPProxy

MEMORY = "memory://"
TOKEN = "a-token-of-the-shop"
SHA256 = hashlib.sha256(TOKEN.encode()).hexdigest()


def memory() -> StoreService:
    return StoreService(open_store(MEMORY, StoreOptions())[0])


def reach(url: str, timeout: float = 2.0) -> Any:
    return open_store(url, StoreOptions(timeout=timeout))[0]


# The file ---------------------------------------------------------------------------------------


def grants_of(folder: Path, text: str) -> Grants:
    path = folder / "grants.toml"
    path.write_text(text)
    return read_grants(str(path))


def test_a_file_of_grants(tmp_path: Path) -> None:
    grants = grants_of(
        tmp_path,
        f"""
        [shop]
        certificate = "shop.internal"
        store = true

        [billing]
        token_sha256 = "{SHA256}"
        read = ["cart"]
        write = ["paid"]
        """,
    )
    shop = Grant("shop", store=True)
    billing = Grant("billing", read=frozenset({"cart"}), write=frozenset({"paid"}))
    assert grants.of(["shop.internal"], None) == shop
    assert grants.of(["other", "shop.internal"], "whatever") == shop
    assert grants.of([], TOKEN) == billing
    assert grants.of(["other"], TOKEN) == billing
    for names, token in (([], None), (["other"], None), ([], "wrong"), ([], ""), ([""], None)):
        assert grants.of(names, token) is None, (names, token)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("x = 1", "outside of a table"),
        ("[a]\nstore = true", "neither certificate nor token"),
        ("[a]\ncertificate = 'a'\nstor = true", "'stor'"),
        ("[a]\ncertificate = 'a'\nstore = 1", "store = 1"),
        ("[a]\ncertificate = ''", "isn't a name"),
        ("[a]\ntoken_sha256 = 'secret'", "64 hexadecimal"),
        ("[a]\ncertificate = 'a'\nread = 'cart'", "list of session keys"),
        ("[a]\ncertificate = 'a'\nwrite = [1]", "list of session keys"),
        ("[a]\ncertificate = 'a'\n[b]\ncertificate = 'a'", "of another service"),
        (f"[a]\ntoken_sha256 = '{SHA256}'\n[b]\ntoken_sha256 = '{SHA256}'", "of another service"),
        ("[a", "can't be read"),
    ],
)
def test_a_wrong_file_is_named_at_start(text: str, why: str, tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=r"grants\.toml") as caught:
        grants_of(tmp_path, text)
    assert why in str(caught.value)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="nowhere"):
        read_grants(str(tmp_path / "nowhere"))


def test_an_empty_file_grants_nothing(tmp_path: Path) -> None:
    with serving(memory(), grants=grants_of(tmp_path, "")) as address:
        store = reach(f"grpc://{address}")
        with pytest.raises(StoreUnavailable, match="UNAUTHENTICATED"):
            store.load("x" * 43)
        store.close()


# Tokens -----------------------------------------------------------------------------------------


def test_a_token_in_the_url(caplog: pytest.LogCaptureFixture) -> None:
    denied: list[AccessDenied] = []
    events = Events()
    events.subscribe(AccessDenied, denied.append)
    digest = hashlib.sha256(TOKEN.encode()).digest()
    weak = hashlib.sha256(b"weak").digest()
    grants = Grants(by_token={digest: Grant("shop", store=True), weak: Grant("weak", verify=True)})
    with serving(memory(), grants=grants, events=events) as address:
        record = a_record(time.time)
        granted = reach(f"grpc://{TOKEN}@{address}")
        granted.create(record)
        assert granted.load(record.key) == record
        for url, status in (
            (f"grpc://wrong-word@{address}", "UNAUTHENTICATED"),
            (f"grpc://{address}", "UNAUTHENTICATED"),
            (f"grpc://weak@{address}", "PERMISSION_DENIED"),
        ):
            store = reach(url)
            calls = (lambda s=store: s.load(record.key), lambda s=store: s.delete(record.key))
            for call in calls:
                with pytest.raises(StoreUnavailable, match=status):
                    call()
            store.close()
        assert granted.load(record.key) == record
        granted.close()
    assert [each.service for each in denied] == ["", "", "", "", "weak", "weak"]
    assert denied[-1].what == "Delete: the grant `store`"
    assert "Refused the service weak: Delete" in caplog.text
    assert TOKEN not in caplog.text
    assert "wrong-word" not in caplog.text


# Mutual TLS -------------------------------------------------------------------------------------


@contextmanager
def tls_server(authority: Authority, grants: Grants) -> Iterator[int]:
    certificate, key = authority.sign("sessions.internal")
    server = Server([memory()], grants, Events(), 4)
    paths = {"ca": str(authority.ca), "cert": str(certificate), "key": str(key)}
    port = server.listen("127.0.0.1:0", CertificateFiles(paths, "The test"))
    server.start()
    try:
        yield port
    finally:
        server.stop().wait()


def url_with(port: int, authority: Authority, name: str, more: str = "") -> str:
    certificate, key = authority.sign(name)
    return f"grpcs://127.0.0.1:{port}?ca={authority.ca}&cert={certificate}&key={key}{more}"


def test_mutual_tls(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    ours, foreign = Authority(tmp_path / "ours"), Authority(tmp_path / "foreign", "foreign")
    grants = Grants(
        by_certificate={
            "shop.internal": Grant("shop", store=True),
            "billing.internal": Grant("billing", read=frozenset({"cart"})),
        }
    )
    with tls_server(ours, grants) as port:
        shop = reach(url_with(port, ours, "shop.internal"))
        record = a_record(time.time)
        shop.create(record)
        assert shop.load(record.key) == record
        shop.close()
        named = reach(url_with(port, ours, "shop.internal", "&name=sessions.internal"))
        assert named.load(record.key) == record
        named.close()
        certificate, key = foreign.sign("shop.internal")
        other = ours.sign("other.internal", common_name="shop.internal")
        refused = {
            f"grpcs://127.0.0.1:{port}?ca={ours.ca}&cert={other[0]}&key={other[1]}": (
                "UNAUTHENTICATED"
            ),
            url_with(port, ours, "billing.internal"): "PERMISSION_DENIED",
            url_with(port, ours, "nobody.internal"): "UNAUTHENTICATED",
            # Signed by somebody else, none at all, or a server that isn't the one meant.
            f"grpcs://127.0.0.1:{port}?ca={ours.ca}&cert={certificate}&key={key}": "UNAVAILABLE",
            f"grpcs://127.0.0.1:{port}?ca={ours.ca}": "UNAVAILABLE",
            url_with(port, foreign, "shop.internal"): "UNAVAILABLE",
            url_with(port, ours, "shop.internal", "&name=other.internal"): "UNAVAILABLE",
            f"grpc://127.0.0.1:{port}": "UNAVAILABLE",
        }
        for url, status in refused.items():
            store = reach(url, 0.8)
            with pytest.raises(StoreUnavailable, match=status):
                store.load(record.key)
            with pytest.raises(StoreUnavailable, match=status):
                store.delete(record.key)
            store.close()
        assert "nobody.internal" in caplog.text
        said = subprocess.run(
            [sys.executable, "-c", REFUSED, url_with(port, foreign, "shop.internal")],
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert (said.stdout, said.stderr) == ("refused\n", "")


#: gRPC itself would write a line for each failed handshake.
REFUSED = """
import sys
from flask_gsession.errors import StoreUnavailable
from flask_gsession.stores import StoreOptions, open_store

store = open_store(sys.argv[1], StoreOptions())[0]
try:
    store.load("x" * 43)
except StoreUnavailable:
    print("refused")
store.close()
"""


def put(files: tuple[Path, ...], places: tuple[Path, ...]) -> None:
    """Replace each file in one step, as tools that renew certificates do."""
    for file, place in zip(files, places, strict=True):
        new = place.with_suffix(".new")
        new.write_bytes(file.read_bytes())
        new.rename(place)


def test_grants_that_look_as_old_as_the_last_ones_count(tmp_path: Path) -> None:
    """Archives and copies set a file's time, digests have one length, and inodes are used again."""
    path, swapped = tmp_path / "grants.toml", tmp_path / "new"

    def text(token: str) -> str:
        digest = hashlib.sha256(token.encode()).hexdigest()
        return f'[shop]\ntoken_sha256 = "{digest}"\n'

    def write(place: Path, token: str) -> None:
        place.write_text(text(token))
        os.utime(place, (0, 0))

    def again(token: str) -> None:
        path.unlink()
        write(path, token)

    def rename(token: str) -> None:
        write(swapped, token)
        swapped.rename(path)

    write(path, "0")
    grants = GrantsFile(str(path))
    ways = (lambda token: write(path, token), again, rename)
    for number in range(1, 10):
        ways[number % 3](str(number))
        assert grants.of([], str(number)) == Grant("shop")
        assert grants.of([], str(number - 1)) is None, number


def test_grants_are_replaced_while_serving(
    tmp_path: Path, redis_url: str, store_prefix: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Also for a stream of changes. A file that can't be used changes nothing."""
    path, new = tmp_path / "grants.toml", tmp_path / "new"

    def replace(text: str) -> None:
        new.write_text(text)
        new.rename(path)

    def load() -> str:
        try:
            return "done" if store.load("x" * 43) is None else "?"
        except StoreUnavailable as error:
            return error.detail

    shop = f"[shop]\ntoken_sha256 = '{SHA256}'\n"
    path.write_text(shop + "store = true")
    far = open_store(redis_url, StoreOptions(store_prefix))[0]
    with serving(StoreService(far), grants=GrantsFile(str(path))) as address:
        store = reach(f"grpc://{TOKEN}@{address}")
        assert load() == "done"
        store.changes.subscribe(Hears())
        until(lambda: store.changes.feed("x" * 43))
        for wrong in ("[shop]\nstore = 1", "", "[shop"):
            replace(wrong)
            assert load() == load() == "done"
        path.unlink()
        assert load() == load() == "done"
        assert caplog.text.count("Grants were replaced, but the old ones stay") == 4
        assert store.changes.feed("x" * 43)
        replace(shop + "verify = true")
        assert "PERMISSION_DENIED" in load()
        until(lambda: not store.changes.feed("x" * 43))
        until(lambda: "PERMISSION_DENIED" in store.changes.trouble)
        replace(shop + "store = true")
        assert load() == "done"
        until(lambda: store.changes.feed("x" * 43))
        replace("[other]\ncertificate = 'other.internal'")
        assert "UNAUTHENTICATED" in load()
        store.close()
    far.close()


class Hears:
    def changed(self, keys: object) -> None: ...

    def lost(self) -> None: ...


def test_grants_are_replaced_for_introspection(tmp_path: Path) -> None:
    path = tmp_path / "grants.toml"
    app = Flask(__name__)
    app.secret_key = "a key for the tests"
    ext = Session(app, store=MEMORY)
    service = "[{}]\ntoken_sha256 = '{}'\nverify = true"
    path.write_text(service.format("billing", "0" * 64))
    app.register_blueprint(introspection_blueprint(ext, str(path)))
    asking = {"authorization": f"Bearer {TOKEN}"}

    def ask() -> int:
        client = app.test_client()
        return client.post("/session/introspect", data={"token": "x"}, headers=asking).status_code

    assert ask() == 401
    path.write_text(service.format("shop", SHA256) + "\nread = ['cart']")
    assert ask() == 200


def test_certificates_are_replaced_while_serving(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    old, new = Authority(tmp_path / "old", "old"), Authority(tmp_path / "new", "new")
    grants = Grants(by_certificate={"shop.internal": Grant("shop", store=True)})
    places = [tuple(tmp_path / f"{who}.{what}" for what in ("cert", "key", "ca")) for who in "sc"]
    serving_, calling = places
    put((*old.sign("sessions.internal"), old.ca), serving_)
    put((*old.sign("shop.internal"), old.ca), calling)
    server = Server([memory()], grants, Events(), 4)
    paths = dict(zip(("cert", "key", "ca"), map(str, serving_), strict=True))
    port = server.listen("127.0.0.1:0", CertificateFiles(paths, "The test"))
    server.start()
    cert, key, ca = calling
    with TCPProxy(port) as proxy:
        url = f"grpcs://127.0.0.1:{proxy.port}?ca={ca}&cert={cert}&key={key}"
        early = url_with(proxy.port, old, "shop.internal")
        store = reach(url)
        assert store.load("x" * 43) is None
        # Half of a pair changes nothing, on either side.
        fresh = [(*new.sign(name), new.ca) for name in ("sessions.internal", "shop.internal")]
        for files, there in zip(fresh, places, strict=True):
            put(files[:1], there[:1])
        proxy.disconnect()
        assert store.load("x" * 43) is None
        assert 1 <= caplog.text.count("the old ones stay") <= 2  # once on each side
        for files, there in zip(fresh, places, strict=True):
            put(files, there)
        assert store.load("x" * 43) is None, "an open connection stays"
        proxy.disconnect()
        assert store.load("x" * 43) is None
        store.close()
        late = reach(early)
        with pytest.raises(StoreUnavailable, match="UNAVAILABLE"):
            late.load("x" * 43)
        late.close()
    server.stop().wait()


def test_a_certificate_that_expired_is_refused(tmp_path: Path) -> None:
    """On either side, and never with a word about a session."""
    authority = Authority(tmp_path)
    grants = Grants(by_certificate={"shop.internal": Grant("shop", store=True)})
    with tls_server(authority, grants) as port:
        authority.hours = -1
        store = reach(url_with(port, authority, "shop.internal"))
        with pytest.raises(StoreUnavailable, match="UNAVAILABLE"):
            store.load("x" * 43)
        store.close()
    with tls_server(authority, grants) as port:
        authority.hours = 1
        store = reach(url_with(port, authority, "shop.internal"))
        with pytest.raises(StoreUnavailable, match="UNAVAILABLE"):
            store.load("x" * 43)
        store.close()


def test_a_key_that_does_not_fit_is_named_at_start(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    certificate, _ = authority.sign("a.internal")
    _, other = authority.sign("b.internal")
    broken = tmp_path / "broken.pem"
    broken.write_text("no PEM")
    for query in (
        f"cert={certificate}&key={other}",
        f"ca={broken}",
        f"ca={authority.ca}&cert={broken}&key={other}",
    ):
        with pytest.raises(SettingError, match="PEM file that") as caught:
            Session(Flask(__name__), store=f"grpcs://host?{query}")
        assert str(tmp_path) in str(caught.value)


# Addresses --------------------------------------------------------------------------------------

ALL = Certificates(b"ca", b"chain", b"key")


@pytest.mark.parametrize(
    ("address", "certificates", "why"),
    [
        ("0.0.0.0:7443", None, "from other machines"),
        ("sessions.internal:7443", None, "from other machines"),
        (":7443", None, "from other machines"),
        ("[::]:7443", None, "from other machines"),
        ("127.0.0.1", None, "isn't an address"),
        ("127.0.0.1:https", None, "isn't an address"),
        ("0.0.0.0:7443", ALL._replace(ca=None), "needs all three: --cert and --key"),
        ("0.0.0.0:7443", ALL._replace(chain=None), "needs all three: --cert and --key"),
        ("unix:/run/x.sock", ALL, "remove --cert, --key and --ca"),
    ],
)
def test_an_address_that_others_could_reach(
    address: str, certificates: Certificates | None, why: str
) -> None:
    with pytest.raises(SettingError, match=why):
        check_address(address, certificates)


@pytest.mark.parametrize("address", ["127.0.0.1:1", "localhost:1", "[::1]:1", "unix:/run/x.sock"])
def test_an_address_of_this_machine(address: str) -> None:
    check_address(address, None)


def test_a_unix_socket_is_for_its_user(tmp_path: Path) -> None:
    path = tmp_path / "grpc.sock"
    server = Server([memory()], FULL_ACCESS, Events(), 2)
    before = os.umask(0)
    try:
        server.listen(f"unix:{path}", None)
        assert os.umask(0) == 0
    finally:
        os.umask(before)
    server.start()
    assert stat.S_IMODE(path.stat().st_mode) & 0o177 == 0
    store = reach(f"grpc://{path}")
    assert store.load("x" * 43) is None
    store.close()
    server.stop().wait()


def test_a_file_in_the_place_of_the_socket_stays(tmp_path: Path) -> None:
    path = tmp_path / "grpc.sock"
    path.write_text("precious")
    server = Server([memory()], FULL_ACCESS, Events(), 2)
    with pytest.raises(SettingError, match="isn't a socket"):
        server.listen(f"unix:{path}", None)
    assert path.read_text() == "precious"
    server.stop().wait()


def test_a_port_that_is_taken_is_named() -> None:
    with serving(memory()) as address:
        server = Server([memory()], FULL_ACCESS, Events(), 2)
        with pytest.raises(SettingError, match=address):
            server.listen(address, None)
        server.stop().wait()


# The command ------------------------------------------------------------------------------------


def run(*options: str, store: str = MEMORY) -> Any:
    app = Flask(__name__)
    app.secret_key = "x"
    Session(app, store=store)
    return app.test_cli_runner().invoke(gsession, ["serve", *options])


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (("--grpc", "127.0.0.1:0"), "--grants FILE"),
        (("--grpc", "0.0.0.0:7443", "--grants", "x"), "from other machines"),
        (("--grpc", "127.0.0.1:0", "--grants", "/nowhere"), "/nowhere"),
        (("--grpc", "0.0.0.0:0", "--cert", "/nowhere"), "one of cert and key"),
        (("--grpc", "unix:/x", "--threads", "0"), "--threads must be 1 to 1000"),
        ((), "--grpc"),
    ],
)
def test_the_command_names_the_wrong_option(options: tuple[str, ...], why: str) -> None:
    result = run(*options)
    assert result.exit_code != 0
    assert why in result.output
    assert "Traceback" not in result.output
