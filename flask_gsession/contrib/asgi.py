"""Sessions of a Flask application in a FastAPI or Starlette service. Read-only."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Unpack

from flask import Flask

try:
    from starlette.datastructures import Headers
    from starlette.exceptions import HTTPException
    from starlette.requests import HTTPConnection
except ImportError as error:
    raise ImportError(
        f"flask_gsession.contrib.asgi needs the package {error.name}: install the extra, "
        "flask-gsession[asgi]"
    ) from None

from ..config import set_secret_keys
from ..errors import StoreUnavailable
from ..extension import Session
from ..opening import SessionPeek
from ..sharing.verify import find_presented, interface_of

if TYPE_CHECKING:
    from ..config import SettingKeywords


class SharedSessions:
    """Reads the sessions of a Flask application with the same secret key and settings.

    ::

        sessions = SharedSessions("the secret key", store="grpcs://sessions.internal")

        @app.get("/")
        async def home(session: Annotated[SessionPeek | None, Depends(sessions)]):
            ...

    ``secret_key`` and ``fallbacks``: the application's ``SECRET_KEY`` and ``SECRET_KEY_FALLBACKS``.
    ``settings``: the keywords of its ``Session``, and ``cookie_name`` if that isn't ``session``.
    Raises ``SettingError``.
    """

    def __init__(
        self,
        secret_key: str | bytes,
        *,
        fallbacks: Iterable[str | bytes] = (),
        **settings: Unpack[SettingKeywords],
    ) -> None:
        self._app = Flask(__name__)
        set_secret_keys(self._app, secret_key, fallbacks)
        self._ext = Session(self._app, **settings)
        self._interface = interface_of(self._ext, self._app)

    async def __call__(self, connection: HTTPConnection) -> SessionPeek | None:
        """The session of a request or a WebSocket; None without a session.

        Its token is in the cookie, or in the header ``token_header`` if that is set. This doesn't
        count as use of the session. Raises Starlette's 503 with ``Retry-After`` if the store does
        not answer. One round trip, in a thread.
        """
        headers = connection.headers
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(None, self._read, headers)
        except StoreUnavailable as error:
            again = {"Retry-After": str(error.retry_after)}
            raise HTTPException(503, "the session store is unavailable", again) from error

    # Real types: older versions of FastAPI can't resolve text annotations of a callable object.
    __call__.__annotations__.update(connection=HTTPConnection)

    def _read(self, headers: Headers) -> SessionPeek | None:
        cookies = "; ".join(headers.getlist("cookie"))
        with self._app.app_context():
            loaded = find_presented(self._interface, self._app, cookies, headers)
        return None if loaded is None else SessionPeek(self._interface.repository, loaded)

    def close(self) -> None:
        """Release the connections of the store."""
        self._ext.close(self._app)


def signed_in(session: SessionPeek | None, user: str = "_user_id") -> Any:
    """The user's id in the session. Raises Starlette's 401 if nobody is signed in."""
    found = None if session is None else session.get(user)
    if found is None or found == "":
        raise HTTPException(401, "not signed in", {"WWW-Authenticate": "Cookie"})
    return found
