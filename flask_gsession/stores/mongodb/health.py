"""Doctor checks for MongoDB: whether its version and settings suit sessions."""

from __future__ import annotations

import ssl
from collections.abc import Iterator, Mapping
from datetime import UTC
from typing import Any

from pymongo.errors import OperationFailure

from ..exposure import exposure_of, known_faults, unchecked
from ..parts import Checks, Finding
from .driver import Driver, call
from .indexes import expiry_index_advice
from .journal import JOURNAL
from .layout import Layout
from .round_trips import SessionCollection

_OLDEST = (5, 0)
# The first releases without these faults.
_FIXED_WRITES = {(5, 0): 3}
_FIXED_LEAK = {(5, 0): 32, (6, 0): 27, (7, 0): 28, (8, 0): 17, (8, 2): 3}
_SKEW = 1.0  # seconds
_LAG = 10.0  # seconds
_SAFE = 3  # data-bearing members
_OF_DATA = ("RSPrimary", "RSSecondary")


class MongoDBChecks(Checks):
    """The part ``checks`` of a MongoDB store."""

    def __init__(self, driver: Driver, layout: Layout) -> None:
        self.driver = driver
        self._layout = layout

    @call("check")
    def check(self, collection: SessionCollection) -> list[Finding]:
        after = self.driver.expire_after
        found = checked(collection, self.driver.blobs, self._layout.clock(), after)
        return [*found, *_journal_rights(collection)] if after else found


def checked(collection: Any, blobs: Any, now: float, after: int = 0) -> list[Finding]:
    """The findings on the server of these collections; ``now`` is our time in seconds since 1970.

    ``after``: how many seconds after its expiry the TTL index removes a session.

    Raises the driver's errors, except for missing permissions.
    """
    client = collection.database.client
    hello = collection.database.command("hello")
    version = str(client.server_info()["version"])
    return [
        _version(version),
        *_known_faults(version),
        *_exposure_of(client),
        *_members(client, hello),
        *_write_concern(client, hello),
        *_index(collection, "expiry index", "idle_expires_at", after),
        *_index(blobs, "expiry index of large values", "expires_at"),
        *_clock(hello["localTime"].replace(tzinfo=UTC).timestamp() - now),
    ]


def _version(version: str) -> Finding:
    if tuple(map(int, version.split(".")[:2])) < _OLDEST:
        return Finding("error", "server version", version, "5.0 or newer is required.")
    return Finding("ok", "server version", version)


def _known_faults(version: str) -> Iterator[Finding]:
    yield from known_faults(
        version, _FIXED_WRITES, "WT-7995: after a crash, data can be damaged or missing", "error"
    )
    yield from known_faults(
        version, _FIXED_LEAK, "CVE-2025-14847: anyone who reaches it can read its memory"
    )


def _exposure_of(client: Any) -> Iterator[Finding]:
    """Check whether strangers can connect or eavesdrop."""
    is_open = not _requires_password(client)
    host = (client.address or ("",))[0]
    if host.startswith("/"):
        yield from exposure_of(is_open, tls=None, host="")
        return
    # The client has no public API for its TLS settings.
    context = getattr(client.options.pool_options, "_ssl_context", None)
    yield from exposure_of(is_open, tls=context is not None, host=host)
    if context is not None and context.verify_mode == ssl.CERT_NONE:
        yield unchecked("tlsAllowInvalidCertificates or tlsInsecure")


def _requires_password(client: Any) -> bool:
    status = client.admin.command("connectionStatus")
    if not status["authInfo"]["authenticatedUsers"]:
        return False
    try:
        parsed = client.admin.command("getCmdLineOpts")["parsed"]
    except OperationFailure:  # access control is on
        return True
    security = parsed.get("security", {})
    return security.get("authorization") == "enabled" or bool(
        security.keys() & {"keyFile", "clusterAuthMode"}
    )


def _members(client: Any, hello: Mapping[str, Any]) -> Iterator[Finding]:
    if hello.get("msg") == "isdbgrid":
        yield Finding("ok", "replicas", "not checked: this is a mongos")
        return
    hosts = [*hello.get("hosts", ()), *hello.get("passives", ())]
    if len(hosts) < 2:
        yield Finding(
            "warning",
            "replicas",
            "none: a single server",
            "If it is lost, so are the sessions: run a replica set of three.",
        )
        return
    if len(hosts) < _SAFE:
        yield Finding(
            "warning",
            "replicas",
            f"{len(hosts)} members with data, {len(hello.get('arbiters', ()))} without",
            "If one is down, writes get no majority: run three members with data.",
        )
    seen = client.topology_description.server_descriptions().values()
    primary = next((each for each in seen if each.server_type_name == "RSPrimary"), None)
    for each in seen:
        if each is not primary and each.server_type_name != "RSArbiter":
            yield _member(each, primary)


def _member(member: Any, primary: Any) -> Finding:
    where = "{}:{}".format(*member.address)
    if member.server_type_name not in _OF_DATA:
        return Finding(
            "warning",
            "replica",
            f"{where} does not answer, or is starting",
            "If one more fails, there may be no majority: check it.",
        )
    lag = _lag(member, primary)
    found = f"{where} is {max(0, lag):.0f} s behind"
    if lag <= _LAG:
        return Finding("ok", "replica", found)
    return Finding(
        "warning", "replica", found, "Writes wait for a majority, which may be slow or missing."
    )


def _lag(member: Any, primary: Any) -> float:
    """How many seconds a member is behind, as far as the driver knows.

    Members were polled at different times, so we compare how old each one's last write was at its
    poll.
    """
    if primary is None or member.last_write_date is None or primary.last_write_date is None:
        return 0.0
    ages = [each.last_update_time - each.last_write_date for each in (member, primary)]
    return float(ages[0] - ages[1])


def _write_concern(client: Any, hello: Mapping[str, Any]) -> Iterator[Finding]:
    try:
        config = client.admin.command("replSetGetConfig")["config"] if "setName" in hello else {}
    except OperationFailure:  # needs a right that sessions don't need
        config = {}
    if config.get("writeConcernMajorityJournalDefault", True):
        yield Finding("ok", "write concern", "majority")
    else:
        yield Finding(
            "warning",
            "write concern",
            "majority, in memory",
            "A power cut of all members can bring ended sessions back: set "
            "writeConcernMajorityJournalDefault to true.",
        )


def _index(collection: Any, check: str, field: str, after: int = 0) -> Iterator[Finding]:
    try:
        indexes = collection.index_information()
    except OperationFailure as error:
        code = (error.details or {}).get("codeName", type(error).__name__)
        yield Finding(
            "warning",
            check,
            f"this user may not list indexes ({code}, code {error.code})",
            "Without the index expired sessions stay invalid, but are not removed.",
        )
        return
    if not indexes and field != "idle_expires_at":
        return  # no large value has been written yet
    advice = expiry_index_advice(indexes, collection.name, field, after)
    if not advice:
        yield Finding("ok", check)
        return
    found = "missing" if advice.startswith("db." + collection.name + ".create") else "not right"
    effect = (
        "Expired sessions may be removed before their end is in the journal."
        if after
        else "Expired sessions stay invalid, but are not removed."
    )
    yield Finding("error", check, found, f"{effect} Let an administrator run: {advice}")


_JOURNAL_RIGHTS = {"": {"collMod"}, JOURNAL: {"find", "insert", "update", "remove"}}


def _journal_rights(collection: Any) -> Iterator[Finding]:
    """Check whether this user has the rights that the journal needs."""
    status = collection.database.client.admin.command("connectionStatus", showPrivileges=True)
    given = status["authInfo"].get("authenticatedUserPrivileges", ())
    if not status["authInfo"]["authenticatedUsers"]:
        return
    lacking = []
    for name, rights in _JOURNAL_RIGHTS.items():
        name = name or collection.name
        has = {
            action
            for each in given
            if _covers(each["resource"], collection.database.name, name)
            for action in each["actions"]
        }
        if missing := rights - has:
            lacking.append(f"{', '.join(sorted(missing))} on {name}")
    if lacking:
        yield Finding(
            "error",
            "journal permissions",
            f"this user lacks {'; '.join(lacking)}",
            "Sessions can't be written, or events don't reach the journal: grant these "
            "permissions.",
        )
    else:
        yield Finding("ok", "journal permissions")


def _covers(resource: Mapping[str, Any], database: str, collection: str) -> bool:
    if resource.get("anyResource"):
        return True
    return (
        resource.get("db") in ("", database)
        and resource.get("collection") in ("", collection)
        and not resource.get("cluster")
    )


def _clock(skew: float) -> Iterator[Finding]:
    found = f"the server's is {round(skew, 1) + 0:+.1f} s from this machine's"  # no -0.0
    if abs(skew) > _SKEW:
        yield Finding(
            "error",
            "clock",
            found,
            "Sessions end early or late: synchronise both clocks with a time server.",
        )
    else:
        yield Finding("ok", "clock", found)
