"""Names the device of a request as its owner would: "Firefox on Windows"."""

from __future__ import annotations

import importlib.util
from functools import cache
from typing import Any

_LONGEST_AGENT = 512  # characters; the rest would only slow down the search
_LONGEST = 100

# Without ua-parser: the first of these that a user agent contains. Order matters, since browsers
# also name other browsers.
_BROWSERS = {
    "Edg": "Edge",
    "OPR/": "Opera",
    "SamsungBrowser/": "Samsung Internet",
    "Firefox/": "Firefox",
    "FxiOS/": "Firefox",
    "CriOS/": "Chrome",
    "Chrome/": "Chrome",
    "Safari/": "Safari",
    "curl/": "curl",
}
_SYSTEMS = {
    "iPhone": "iPhone",
    "iPad": "iPad",
    "Android": "Android",
    "Windows": "Windows",
    "CrOS": "ChromeOS",
    "Mac OS": "macOS",
    "Linux": "Linux",
}
# ua-parser names each build of a browser, in words that mean nothing to the device's owner.
_WORDS = {"Mobile", "iOS", "WebView", "UI/WKWebView"}
_NAMES = {"HeadlessChrome": "Chrome", "Mac OS X": "macOS", "Chrome OS": "ChromeOS"}


def device_label(user_agent: str) -> str:
    """The label for a ``User-Agent`` header; "" for an unknown client.

    With ua-parser (extra ``devices``), it knows thousands of clients; otherwise, the common
    browsers.
    """
    agent = user_agent[:_LONGEST_AGENT]
    browser, system = _parsed(agent) if _has_parser() else ("", "")
    browser = browser or _first(_BROWSERS, agent)
    # "iPhone" says more than "iOS".
    known = _first(_SYSTEMS, agent)
    system = known if known in ("iPhone", "iPad") else system or known
    if browser and system:
        return f"{browser} on {system}"[:_LONGEST]
    return (browser or system)[:_LONGEST]


def _first(names: dict[str, str], agent: str) -> str:
    return next((name for part, name in names.items() if part in agent), "")


@cache
def _has_parser() -> bool:
    return importlib.util.find_spec("ua_parser") is not None


def _parsed(agent: str) -> tuple[str, str]:
    from ua_parser import parse_os, parse_user_agent

    return _plain(parse_user_agent(agent)), _plain(parse_os(agent))


def _plain(found: Any) -> str:
    """The common name of a family, in printable characters."""
    family = "" if found is None else str(found.family)
    name = _NAMES.get(family, family)
    name = " ".join(word for word in name.split() if word not in _WORDS)
    return "".join(filter(str.isprintable, name))
