"""Flask-Session's settings, as its versions 0.5 to 0.8 understand them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

from werkzeug.local import LocalProxy

from .errors import SettingError

_NO_STORE = (
    "sessions would be stored in a file on this machine. Set SESSION_STORE to the URL of a Redis "
    'or MongoDB, or to "sqlite:///gsession.sqlite3" for a file on this machine'
)
#: Types whose sessions can be taken over.
READABLE = ("redis", "mongodb", "sqlalchemy", "cachelib", "filesystem")
#: Flask-Session's settings that say where sessions are, besides the type.
_CLIENTS = {
    "redis": "SESSION_REDIS",
    "mongodb": "SESSION_MONGODB",
    "sqlalchemy": "SESSION_SQLALCHEMY",
    "cachelib": "SESSION_CACHELIB",
    "memcached": "SESSION_MEMCACHED",
    "dynamodb": "SESSION_DYNAMODB",
}
_DEFAULT_URLS = {"redis": "redis://localhost:6379/0", "mongodb": "mongodb://localhost:27017"}


@dataclass(frozen=True, slots=True)
class FlaskSessionSettings:
    """Flask-Session's settings in the application's configuration.

    ``client`` is the value of the type's own setting, such as ``SESSION_REDIS``, unwrapped.
    """

    type: str
    client: Any
    prefix: str = "session:"
    use_signer: bool = False
    permanent: bool = True
    id_length: int = 32
    database: str = "flask_session"
    collection: str = "sessions"
    table: str = "sessions"
    schema: str | None = None
    bind_key: str | None = None
    folder: str = "flask_session"

    def __repr__(self) -> str:
        return f"<FlaskSessionSettings of type {self.type}>"

    @property
    def is_readable(self) -> bool:
        """Whether sessions of this type can be taken over."""
        return self.type in READABLE

    def store(self) -> Any:
        """The default for ``SESSION_STORE``. Raises ``SettingError``."""
        if self.type not in _DEFAULT_URLS:
            raise SettingError(
                f"SESSION_TYPE is {self.type!r}, a store that Flask-GSession does not have, and "
                f"SESSION_STORE is not set: {_NO_STORE}"
            )
        if self.client is None:
            raise SettingError(
                f"SESSION_TYPE is {self.type!r}, but neither SESSION_STORE nor "
                f"{_CLIENTS[self.type]} is set. Set SESSION_STORE to the URL of your server. "
                f"Flask-Session's default is {_DEFAULT_URLS[self.type]}"
            )
        return self.place

    @property
    def place(self) -> Any:
        """The client or URL of the server that has the old sessions."""
        return self.client if self.client is not None else _DEFAULT_URLS[self.type]


def read_flask_session_settings(config: Mapping[str, Any]) -> FlaskSessionSettings | None:
    """The settings in ``config``; None if ``SESSION_TYPE`` isn't set. Raises ``SettingError``."""
    kind = config.get("SESSION_TYPE")
    if kind is None or kind == "null":
        return None
    if not isinstance(kind, str):
        raise SettingError(f"SESSION_TYPE is of type {type(kind).__name__}; allowed: text")
    kind = kind.lower()[:40]
    client_key = _CLIENTS.get(kind)
    client = None if client_key is None else unwrapped(client_key, config.get(client_key))

    def text(key: str, default: str) -> str:
        value = config.get(key, default)
        if type(value) is not str:
            raise SettingError(f"{key} is of type {type(value).__name__}; allowed: text")
        return value

    length = config.get("SESSION_ID_LENGTH")
    return FlaskSessionSettings(
        type=kind,
        client=client,
        prefix=text("SESSION_KEY_PREFIX", "session:"),
        use_signer=bool(config.get("SESSION_USE_SIGNER", False)),
        permanent=bool(config.get("SESSION_PERMANENT", True)),
        id_length=length if is_id_length(length) else 32,
        database=text("SESSION_MONGODB_DB", "flask_session"),
        collection=text("SESSION_MONGODB_COLLECT", "sessions"),
        table=text("SESSION_SQLALCHEMY_TABLE", "sessions"),
        schema=config.get("SESSION_SQLALCHEMY_SCHEMA"),
        bind_key=config.get("SESSION_SQLALCHEMY_BIND_KEY"),
        folder=text("SESSION_FILE_DIR", os.path.join(os.getcwd(), "flask_session")),
    )


def is_id_length(value: Any) -> TypeGuard[int]:
    """Whether we read ids of this many bytes. Flask-Session itself has no limits."""
    return type(value) is int and 8 <= value <= 256


def unwrapped(key: str, value: Any) -> Any:
    """The client inside a ``LocalProxy`` or a ``FlaskRedis``. Raises ``SettingError``."""
    if isinstance(value, LocalProxy) or type(value) is LocalProxy:
        try:
            value = value._get_current_object()
        except RuntimeError:
            raise SettingError(
                f"{key} is a LocalProxy that is unbound: call Session(app) in an "
                "application context in which it is bound, or pass the client itself"
            ) from None
    for kind in type(value).__mro__:
        if kind.__name__ == "FlaskRedis":
            client = getattr(value, "_redis_client", None)
            if client is None:
                raise SettingError(
                    f"{key} is a FlaskRedis that has no client yet: call its init_app(app) before "
                    "Session(app)"
                )
            return client
    return value
