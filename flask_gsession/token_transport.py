"""Carries tokens between client and server: in a signed cookie, or in a header."""

from __future__ import annotations

import math
from datetime import UTC, datetime

from flask import Flask, Request, Response
from flask.sessions import SessionInterface
from msgspec import Struct

from .config import secret_keys, token_settings
from .repository.permanent import is_permanent
from .repository.repository import Repository
from .request.ending import leads_nowhere
from .request.lifecycle import Lifecycle
from .request.state import Presented
from .stores.base import Record
from .tokens import TokenSigner

_NOTHING = Presented()

#: The suffix of the cookie or header with the version that the client wrote last.
_VERSION, _VERSION_HEADER = "-v", "-Version"
_VERSION_IN_COOKIES = f"{_VERSION}="

#: Blanks around cookies and headers (RFC 6265, 4.2.1; RFC 9110, 5.5). A WSGI server decodes bytes
#: as Latin-1, and ``str.strip`` would then also remove 0x85 and 0xA0. With such a byte before the
#: name, a sibling domain could plant a cookie with a ``__Host-`` name.
_BLANKS = " \t"
_LONGEST_VERSION = 20  # digits


class Signing(Struct, frozen=True):
    """The signer of the tokens in a cookie, the name of the cookie, and the ``start`` of the pair.

    ``given``: the settings that it was created for.
    """

    given: object
    name: str
    signer: TokenSigner
    start: str

    def __repr__(self) -> str:
        """Hides the keys, since error trackers store local variables."""
        return "<Signing>"

    def __rich_repr__(self) -> list[tuple[str, object]]:
        return []


class TokenTransport:
    """Reads and writes the token of one ``Session``, and the version for the near cache.

    ``interface``: its getters give the attributes of the cookie.
    """

    def __init__(self, repository: Repository, interface: SessionInterface) -> None:
        self._repository = repository
        self._interface = interface
        self._live = repository.live
        self._token_header = repository.settings.token_header
        self._signing: Signing | None = None

    def present(self, app: Flask, request: Request) -> Presented:
        """Read and check the token of the request. No round trip."""
        if self._token_header is not None and self._token_header in request.headers:
            return self._present_header(app, request.headers[self._token_header])
        cookies = request.environ.get("HTTP_COOKIE")
        if not cookies:
            return _NOTHING
        given, signing = token_settings(app, self._live.own_key), self._signing
        if signing is None or signing.given != given:
            signing = self._new_signing(app, given)
        before, start, rest = cookies.partition(signing.start)
        if not start:
            return _NOTHING
        if start in rest or (before and not before.rstrip(_BLANKS).endswith(";")):
            return _present_cookies(signing, cookies)
        # A signed token needs no quotes. A quoted value isn't ours.
        return Presented(signing.signer.check(rest.partition(";")[0].rstrip(_BLANKS)))

    def _present_header(self, app: Flask, value: str) -> Presented:
        value = value.strip(_BLANKS)
        checked = self.signing(app).signer.check(value) if value else None
        return Presented(checked, by_header=True)

    def signing(self, app: Flask) -> Signing:
        """The signer for the application's current settings."""
        given, signing = token_settings(app, self._live.own_key), self._signing
        if signing is None or signing.given != given:
            signing = self._new_signing(app, given)
        return signing

    def _new_signing(self, app: Flask, given: object) -> Signing:
        live = self._live
        name, keys = live.cookie_name(), live.secret_keys()
        if not keys[0]:
            keys = secret_keys(app)  # raises an error that says what is wrong
        signing = self._signing = Signing(given, name, TokenSigner(keys, name), f"{name}=")
        return signing

    def last_seen_version(self, request: Request, by_header: bool) -> int | None:
        """The version that the client wrote last, from its cookie or header."""
        if by_header:
            text = request.headers.get(f"{self._token_header}{_VERSION_HEADER}", "")
        else:
            cookies = request.environ.get("HTTP_COOKIE", "")
            if _VERSION_IN_COOKIES not in cookies:
                return None
            start = f"{self._live.cookie_name()}{_VERSION}="
            text = cookies.partition(start)[2].partition(";")[0].strip(_BLANKS)
        return int(text) if text.isdecimal() and len(text) <= _LONGEST_VERSION else None

    def send_version(self, life: Lifecycle, loaded: Record | None, response: Response) -> None:
        """Let the client's next request see this write, whichever worker serves it.

        The version lasts for the near cache's ``bound``; after that, no near cache has an older
        record.
        """
        near, record = self._repository.near, life.seen.record
        if near is None or record is None or loaded is None:
            return
        if record.key != loaded.key or record.version == loaded.version:
            return
        response.cache_control.no_store = True
        if life.presented().by_header:
            response.headers[f"{self._token_header}{_VERSION_HEADER}"] = str(record.version)
            return
        name = self._live.cookie_name()
        response.set_cookie(
            name + _VERSION,
            str(record.version),
            max_age=math.ceil(near.bound),
            **self._live.cookie(name, self._interface),
        )

    def write_token(self, app: Flask, life: Lifecycle, response: Response) -> None:
        """Send or delete the token in the cookie or header that the client uses, if necessary."""
        by_header = life.presented().by_header
        withheld = life.cookie == "set" and life.entry is not None
        if (life.cookie != "keep" and not withheld) or (by_header and leads_nowhere(life)):
            response.cache_control.no_store = True
            if by_header:
                self._write_header(app, life, response)
            else:
                self._write_cookie(app, life, response)

    def _write_header(self, app: Flask, life: Lifecycle, response: Response) -> None:
        name = str(self._token_header)
        token = life.seen.token if life.cookie == "set" else None
        response.headers[name] = self.signing(app).signer.sign(token) if token else ""

    def _write_cookie(self, app: Flask, life: Lifecycle, response: Response) -> None:
        signing = self.signing(app)
        name = signing.name
        attributes = self._live.cookie(name, self._interface)
        token, record = life.seen.token, life.seen.record
        if life.cookie == "delete" or token is None or record is None:
            response.delete_cookie(name, **attributes)
            return
        expires = None
        if is_permanent(life.values.stored):
            expires = datetime.fromtimestamp(record.idle_expires_at / 1000, UTC)
        response.set_cookie(name, signing.signer.sign(token), expires=expires, **attributes)


def _present_cookies(signing: Signing, cookies: str) -> Presented:
    """The token among several cookies, perhaps of our name or with our name inside."""
    values = []
    for pair in cookies.split(";"):
        pair = pair.strip(_BLANKS)
        if pair.startswith(signing.start):
            values.append(pair[len(signing.start) :])
    if len(values) == 1:
        return Presented(signing.signer.check(values[0]))
    if not values:
        return _NOTHING
    return Presented(signing.signer.check_all(dict.fromkeys(values)))
