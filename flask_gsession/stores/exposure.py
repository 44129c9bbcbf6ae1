"""Checks shared by the database servers: access without a password, TLS and known faults."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from ipaddress import ip_address

from .parts import Finding

_SESSIONS = "can read sessions, end them and forge their data"


def is_local(host: str) -> bool:
    """Whether ``host`` is a loopback name or address. Asks no name server."""
    if host.lower() in ("", "localhost"):
        return True
    try:
        return ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def exposure_of(is_open: bool, tls: bool | None, host: str) -> Iterator[Finding]:
    """Findings about a server's password and TLS. ``is_open``: it accepts clients without a
    password.

    ``tls`` is None for a Unix socket, which has file rights instead.
    """
    local = is_local(host)
    if not is_open:
        yield Finding("ok", "password", "needed")
    elif tls is None:
        yield Finding("ok", "password", "none, behind the permissions of a socket file")
    elif local:
        yield Finding(
            "warning",
            "password",
            "none, on this machine",
            f"Every program on this machine {_SESSIONS}: require a password.",
        )
    else:
        yield Finding(
            "error",
            "password",
            "none",
            f"Anyone who can reach the server {_SESSIONS}: require a password.",
        )
    if tls or tls is None or local:
        yield Finding("ok", "TLS", "on" if tls else "off, on this machine")
    else:
        yield Finding(
            "warning",
            "TLS",
            "off",
            "Anyone on the network path can read and change sessions, and sees the password: use "
            "TLS, or a network that encrypts.",
        )


def unchecked(option: str) -> Finding:
    """The finding about TLS that accepts any certificate because of ``option``."""
    return Finding(
        "warning",
        "certificate",
        "not checked",
        f"Anyone on the network path can pose as the server: leave out {option}.",
    )


def known_faults(
    version: str, fixed: Mapping[tuple[int, int], int], fault: str, severity: str = "warning"
) -> Iterator[Finding]:
    """A finding where the version has that fault.

    ``fixed``: the first patch release without the fault, for each major and minor version. Minor
    versions in between were never fixed; later ones never had it.
    """
    numbers = re.match(r"(\d+)\.(\d+)\.(\d+)", version)
    if numbers is None:
        return
    major, minor, patch = map(int, numbers.groups())
    if (major, minor) > max(fixed) or patch >= fixed.get((major, minor), 1 << 30):
        return
    releases = [f"{line[0]}.{line[1]}.{first}" for line, first in sorted(fixed.items())]
    better = next(
        (
            release
            for line, release in zip(sorted(fixed), releases, strict=True)
            if line >= (major, minor)
        ),
        releases[-1],
    )
    yield Finding(
        severity,
        "known fault",
        f"{version} has {fault}",
        f"Update to {better} or newer, unless your distribution has put the fix into {version}.",
    )
