"""`flask gsession doctor` on access to the store, known faults, the place and the cookie."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest
from flask import Flask
from pymongo import MongoClient
from redis import Redis

from flask_gsession import Session
from flask_gsession.stores.exposure import is_local, known_faults
from flask_gsession.stores.mongodb import health as mongodb_health
from flask_gsession.stores.parts import Finding
from flask_gsession.stores.redis import health as redis_health
from tests.harness.servers import MongoServer, RedisServer
from tests.harness.topologies import (
    HOST,
    MongoAuthTLS,
    RedisACL,
    RedisCluster,
    RedisSentinels,
    RedisTLS,
)
from tests.operate.test_doctor import SOUND, application, examine

pytest_plugins = ["tests.harness.topologies"]

EVERYTHING = "~* &* +@all"


def findings(app: Flask) -> dict[str, tuple[str, str]]:
    """Severity and text by check."""
    rows = json.loads(examine(app, "--json").stdout)
    return {row["check"]: (row["severity"], row["found"]) for row in rows}


def severity(app: Flask, *checks: str) -> list[str | None]:
    found = findings(app)
    return [found.get(check, (None,))[0] for check in checks]


# -- the password and TLS


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the servers of the tests appear to be on another machine."""
    monkeypatch.setattr("flask_gsession.stores.exposure.is_local", lambda host: False)


def test_a_redis_without_a_password(redis_url: str) -> None:
    found = findings(application(redis_url))
    assert found["password"] == ("warning", "none, on this machine")
    assert found["TLS"] == ("ok", "off, on this machine")


@pytest.mark.usefixtures("elsewhere")
def test_a_redis_of_another_machine(redis_url: str) -> None:
    found = findings(application(redis_url))
    assert found["password"] == ("error", "none")
    assert found["TLS"] == ("warning", "off")


def test_a_redis_that_wants_a_password(redis_acl: RedisACL) -> None:
    redis_acl.allow(EVERYTHING)
    assert severity(application(redis_acl.url), "password") == ["ok"]
    with Redis.from_url(redis_acl.url) as client:
        assert severity(application(client), "password") == ["ok"]


def test_a_user_does_not_hide_that_others_need_none(redis_client: Redis, redis_url: str) -> None:
    redis_client.execute_command("ACL", "SETUSER", "doctor", "on", ">pass", *EVERYTHING.split())
    try:
        url = redis_url.replace("redis://", "redis://doctor:pass@")
        assert severity(application(url), "password") == ["warning"]
        with Redis.from_url(url) as client:
            assert severity(application(client), "password") == ["warning"]
    finally:
        redis_client.acl_deluser("doctor")


def test_the_resp3_protocol_changes_nothing(redis_acl: RedisACL, redis_url: str) -> None:
    redis_acl.allow(EVERYTHING)
    assert severity(application(f"{redis_acl.url}?protocol=3"), "password") == ["ok"]
    mark = "&" if "?" in redis_url else "?"
    assert severity(application(f"{redis_url}{mark}protocol=3"), "password") == ["warning"]


def test_servers_behind_a_socket_file(own_redis: RedisServer, own_mongo: MongoServer) -> None:
    mongo = own_mongo.socket_path.replace("/", "%2F")
    for url in (
        f"unix://{own_redis.socket_path}",
        f"mongodb://{mongo}/doctor?directConnection=true",
    ):
        found = findings(application(url))
        assert found["password"] == ("ok", "none, behind the permissions of a socket file")
        assert found["TLS"][0] == "ok"


@pytest.mark.usefixtures("elsewhere")
def test_a_redis_with_tls(redis_tls: RedisTLS) -> None:
    assert severity(application(redis_tls.url), "TLS", "certificate") == ["ok", None]
    url = f"{redis_tls.url}&ssl_cert_reqs=none"
    assert severity(application(url), "TLS", "certificate") == ["ok", "warning"]


@pytest.mark.usefixtures("elsewhere")
def test_each_server_of_a_topology(
    redis_sentinels: RedisSentinels, redis_cluster: RedisCluster
) -> None:
    for url in (redis_sentinels.url, redis_cluster.url):
        assert severity(application(url), "password", "TLS") == ["error", "warning"]


def test_a_mongodb_without_a_password(mongodb_url: str) -> None:
    found = findings(application(mongodb_url))
    assert found["password"] == ("warning", "none, on this machine")
    assert found["TLS"] == ("ok", "off, on this machine")


@pytest.mark.usefixtures("elsewhere")
def test_a_mongodb_of_another_machine(mongodb_url: str) -> None:
    assert severity(application(mongodb_url), "password", "TLS") == ["error", "warning"]


@pytest.mark.usefixtures("elsewhere")
def test_a_mongodb_with_password_and_tls(mongo_auth_tls: MongoAuthTLS) -> None:
    checks = ("password", "TLS", "certificate")
    assert severity(application(mongo_auth_tls.url_of("app")), *checks) == ["ok", "ok", None]
    assert severity(application(mongo_auth_tls.url_of("admin")), *checks) == ["ok", "ok", None]
    client: MongoClient[dict[str, Any]]
    with MongoClient(mongo_auth_tls.url_of("app"), tlsAllowInvalidCertificates=True) as client:
        assert severity(application(client), *checks) == ["ok", "ok", "warning"]


def test_a_user_of_a_mongodb_that_enforces_no_rights(own_mongo: MongoServer) -> None:
    with own_mongo.client() as client:
        client.admin.command("createUser", "doctor", pwd="pass", roles=["root"])
    try:
        url = f"mongodb://doctor:pass@{HOST}:{own_mongo.port}/doctor?authSource=admin"
        assert severity(application(url), "password") == ["warning"]
    finally:
        with own_mongo.client() as client:
            client.admin.command("dropUser", "doctor")


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST", "127.0.0.1", "127.8.8.8", "::1", ""])
def test_this_machine(host: str) -> None:
    assert is_local(host)


@pytest.mark.parametrize("host", ["redis", "10.0.0.5", "fd00::2", "localhost.example.org"])
def test_another_machine(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: pytest.fail("looked up"))
    assert not is_local(host)


# -- versions with known faults


@pytest.mark.parametrize(
    ("version", "better"),
    [
        ("6.2.19", "6.2.20"), ("6.2.20", ""), ("7.0.15", "7.2.11"), ("7.2.4", "7.2.11"),
        ("7.4.6", ""), ("8.0.3", "8.0.4"), ("8.1.9", "8.2.2"), ("8.2.1", "8.2.2"), ("8.2.2", ""),
        ("8.4.0", ""), ("9.0.0", ""), ("", ""), ("255.255.255-SNAPSHOT", ""),
    ],
)  # fmt: skip
def test_which_redis_has_a_known_fault(version: str, better: str) -> None:
    assert better in advice(redis_health._known_faults({"redis_version": version}), better)


@pytest.mark.parametrize(
    ("version", "better"),
    [("7.2.10", "7.2.11"), ("8.0.6", ""), ("8.1.3", "8.1.4"), ("9.0.0", "")],
)
def test_which_valkey_has_a_known_fault(version: str, better: str) -> None:
    about = {"server_name": "valkey", "redis_version": "7.2.4", "valkey_version": version}
    assert better in advice(redis_health._known_faults(about), better)


@pytest.mark.parametrize(
    ("version", "severities"),
    [
        ("5.0.2", ["error", "warning"]), ("5.0.3", ["warning"]), ("5.0.32", []),
        ("6.0.13", ["warning"]), ("7.0.28", []), ("8.0.16", ["warning"]), ("8.2.3", []),
        ("8.3.0", []),
    ],
)  # fmt: skip
def test_which_mongodb_has_a_known_fault(version: str, severities: list[str]) -> None:
    found = mongodb_health._known_faults(version)
    assert [finding.severity for finding in found] == severities


def advice(found: Any, better: str) -> str:
    rows: list[Finding] = list(found)
    assert len(rows) == bool(better)
    return rows[0].advice if rows else ""


def test_the_server_of_a_test_is_held_against_the_list(
    redis_client: Redis, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = str(redis_client.info("server")["redis_version"])
    line = tuple(map(int, version.split(".")[:2]))
    fixed: dict[Any, int] = {line: int(version.split(".")[2]) + 1}
    for table in ("_FIXED_REDIS", "_FIXED_VALKEY"):
        monkeypatch.setattr(redis_health, table, fixed)
    assert findings(application(redis_url))["known fault"][0] == "warning"
    assert not list(known_faults(version, {line: fixed[line] - 1}, "a fault"))


# -- the place of the sessions, and the cookie


@pytest.mark.parametrize(
    ("config", "found"),
    [
        ({}, "warning"),
        ({"SESSION_STORE": "memory://"}, None),
        ({"TESTING": True}, None),
    ],
)
def test_a_store_that_nobody_chose(
    config: dict[str, Any], found: str | None, tmp_path: Path
) -> None:
    app = Flask(__name__, instance_path=str(tmp_path))
    app.config.update({**SOUND, **config})
    Session(app)
    assert severity(app, "SESSION_STORE") == [found]


def test_nobody_need_choose_a_store_to_debug(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLASK_DEBUG", "1")
    app = Flask(__name__, instance_path=str(tmp_path))
    app.config.update(SOUND)
    Session(app)
    assert severity(app, "SESSION_STORE", "debug") == [None, "warning"]


def test_the_cookie_is_shown_as_browsers_get_it() -> None:
    found = findings(application("memory://"))
    assert found["cookie"] == ("ok", "__Host-session; Secure; HttpOnly; SameSite=Lax; Path=/")
    app = application(
        "memory://",
        SESSION_COOKIE_NAME="visit",
        SESSION_COOKIE_SECURE=False,
        SESSION_COOKIE_HTTPONLY=False,
        SESSION_COOKIE_SAMESITE=None,
        SESSION_COOKIE_DOMAIN="example.org",
    )
    assert findings(app)["cookie"] == ("ok", "visit; Domain=example.org; Path=/")


@pytest.mark.parametrize(
    ("config", "prefix"),
    [
        ({}, "__Host-visit"),
        ({"SESSION_COOKIE_DOMAIN": "example.org"}, "__Secure-visit"),
        ({"SESSION_COOKIE_PATH": "/shop"}, "__Secure-visit"),
        ({"APPLICATION_ROOT": "/shop"}, "__Secure-visit"),
    ],
)
def test_the_prefix_that_is_advised_is_one_that_can_be(config: dict[str, Any], prefix: str) -> None:
    app = application("memory://", SESSION_COOKIE_NAME="visit", **config)
    assert f"rename it to {prefix}" in " ".join(examine(app).output.split())
    application("memory://", SESSION_COOKIE_NAME=prefix, **config)  # starts


@pytest.mark.parametrize("samesite", ["lax", "STRICT"])
def test_the_case_of_samesite_does_not_matter(samesite: str) -> None:
    app = application("memory://", SESSION_COOKIE_SAMESITE=samesite)
    assert severity(app, "SESSION_COOKIE_SAMESITE") == [None]
