"""A bound on the requests of one client that wait for locks in this process, of any sessions.

Each that waits keeps a thread busy. The queue of a session is bounded in the store; a client may
have many sessions, though, and no store knows whose they are.
"""

from __future__ import annotations

import os

from flask import has_request_context, request

# By process, since a child inherits what its parent's threads do, and by the client's address. The
# steps on sets and dicts are atomic. If two of them cross, a client may wait once more than it may.
_waiting: dict[tuple[int, str], set[str]] = {}


def client() -> str:
    """The network address of the client, of IPv6 the /64; empty outside a request."""
    address = (request.remote_addr if has_request_context() else None) or ""
    if ":" not in address or "." in address:
        return address
    head, gap, _ = address.partition("::")
    groups = head.split(":") if head else []
    return ":".join([*groups, *["0"] * 4][:4] if gap else groups[:4])


def may_wait(address: str, owner: str, most: int | None) -> bool:
    """Whether this owner may wait, beside the others of its client, who are ``most`` with it."""
    if most is None or not address:
        return True
    owners = _waiting.setdefault((os.getpid(), address), set())
    if owner not in owners and len(owners) >= most:
        return False
    owners.add(owner)
    return True


def stop_waiting(address: str, owner: str) -> None:
    """The owner waits no more."""
    owners = _waiting.get((os.getpid(), address))
    if owners is not None:
        owners.discard(owner)
        if not owners:
            _waiting.pop((os.getpid(), address), None)
