"""URLs that may name several hosts."""

from __future__ import annotations

import re
from urllib.parse import SplitResult, urlsplit


def without_hosts(url: str) -> tuple[SplitResult, str]:
    """A URL's parts, and separately its user and hosts as written, which the driver checks.

    From Python 3.14 on, ``urlsplit`` refuses several hosts if one is in brackets.
    """
    scheme, slashes, rest = url.partition("://")
    hosts = re.split("[/?#]", rest, maxsplit=1)[0]
    return urlsplit(scheme + slashes + rest[len(hosts) :]), hosts
