"""Limits how many requests of one client wait for locks in this process.

Each waiting request keeps a thread busy. The store limits the queue of one session, but a client
may have many sessions, and no store knows that they are one client's.
"""

from __future__ import annotations

import os

from flask import has_request_context, request

# By process, since a forked child inherits this dict, and by the client's address. Each step on a
# set or dict is atomic. If two threads race, a client may exceed its limit by one.
_waiting: dict[tuple[int, str], set[str]] = {}


def client() -> str:
    """The client's network address, for IPv6 the /64 network; empty outside a request."""
    address = (request.remote_addr if has_request_context() else None) or ""
    if ":" not in address or "." in address:
        return address
    head, gap, _ = address.partition("::")
    groups = head.split(":") if head else []
    return ":".join([*groups, *["0"] * 4][:4] if gap else groups[:4])


def may_wait(address: str, owner: str, most: int | None) -> bool:
    """Whether this owner may wait too, within ``most`` waiting requests of its client."""
    if most is None or not address:
        return True
    owners = _waiting.setdefault((os.getpid(), address), set())
    if owner not in owners and len(owners) >= most:
        return False
    owners.add(owner)
    return True


def stop_waiting(address: str, owner: str) -> None:
    """Note that the owner stopped waiting."""
    owners = _waiting.get((os.getpid(), address))
    if owners is not None:
        owners.discard(owner)
        if not owners:
            _waiting.pop((os.getpid(), address), None)
