"""The clients that rate limits count: networks, users and other names."""

from __future__ import annotations

from ipaddress import IPv6Address, ip_address, ip_network
from uuid import UUID

from flask import request

from ..errors import SettingError

_NETWORK_V6 = 64  # bits: the smallest network of one customer
_SITE_V6 = 48  # bits: the largest network of one customer


def network_of_client(proxies: int) -> str:
    """The network of the current request's client: an IPv4 address, or an IPv6 /64.

    ``proxies``: as in ``SessionLimits``. A request that bypassed some of the proxies counts for its
    remote address. Requests without an address, such as on a Unix socket, count together.
    """
    address = request.remote_addr or ""
    if proxies:
        hops = ",".join(request.headers.getlist("X-Forwarded-For")).split(",")
        if len(hops) >= proxies and _network(hops[-proxies]):
            address = hops[-proxies]
    return _network(address) or "unknown"


def site_of(network: str) -> str:
    """The largest network of the same customer: the /48 for IPv6."""
    if ":" not in network:
        return network
    return str(ip_network(network).supernet(new_prefix=_SITE_V6))


def _network(text: str) -> str | None:
    text = text.strip()
    if text.startswith("["):
        text = text[1:].partition("]")[0]
    elif text.count(":") == 1:
        text = text.partition(":")[0]
    try:
        address = ip_address(text.partition("%")[0])
    except ValueError:
        return None
    if not isinstance(address, IPv6Address):
        return str(address)
    if address.ipv4_mapped is not None:
        return str(address.ipv4_mapped)
    return str(ip_network((address, _NETWORK_V6), strict=False))


def name_of(value: object, source: str) -> str | None:
    """The name to count by, from the value of the function ``source``; None for no user.

    ``""``, ``0`` and ``False`` mean no user, too: otherwise all clients would share their bucket.
    Raises ``SettingError`` for a value without a stable text, such as most objects.
    """
    get_id = getattr(value, "get_id", None)  # a user of Flask-Login
    if callable(get_id):
        value = get_id()
    if not value:
        return None
    if isinstance(value, (str, int, bytes, UUID)) and not isinstance(value, bool):
        return str(value)
    raise SettingError(
        f"{source} of the rate limits returned a {value.__class__.__name__}; allowed: an id as "
        "text, bytes, a whole number or a UUID, a user with Flask-Login's get_id(), or None"
    )
