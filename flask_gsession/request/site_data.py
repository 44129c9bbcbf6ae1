"""The ``Clear-Site-Data`` header of a response that ends a session.

Source: https://www.w3.org/TR/clear-site-data/, and MDN for the later kinds.
"""

from __future__ import annotations

from collections.abc import Collection

from flask import Request, Response

HEADER = "Clear-Site-Data"
#: The kinds of data that a browser can delete. Not ``"*"``, since that includes the cookies.
KINDS = (
    "cache",
    "clientHints",
    "cookies",
    "executionContexts",
    "prefetchCache",
    "prerenderCache",
    "storage",
)
#: An attribute of the request: the kinds that its response will clear.
CLEARED = "_gsession_clear_site_data"


def checked_kinds(clear: str | Collection[str]) -> tuple[str, ...]:
    """The kinds, each once. Raises ``ValueError``."""
    kinds = (clear,) if isinstance(clear, str) else tuple(clear)
    for kind in kinds:
        if kind not in KINDS:
            raise ValueError(f"clear has {ascii(kind)[:60]}; allowed: {', '.join(KINDS)}")
    return kinds


def clear_with_response(request: Request, kinds: Collection[str]) -> None:
    """Let the response to this request clear these kinds of data."""
    wanted: dict[str, None] = vars(request).setdefault(CLEARED, {})
    wanted.update(dict.fromkeys(kinds))


def write_header(request: Request, response: Response) -> None:
    """Send the header if the request ended a session with it."""
    wanted = vars(request).get(CLEARED)
    if wanted:
        kinds = [f'"{kind}"' for kind in wanted]
        present = [part.strip() for part in response.headers.get(HEADER, "").split(",")]
        response.headers[HEADER] = ", ".join(dict.fromkeys([*filter(None, present), *kinds]))
