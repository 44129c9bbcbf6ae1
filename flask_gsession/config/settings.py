"""The settings of a ``Session``, with their defaults, and its keywords."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields
from datetime import date, timedelta
from typing import Literal, TypedDict

from ..flask_session_settings import FlaskSessionSettings
from ..tokens import TokenFactory
from ..values.merge import MergeFunction, last

#: The last item of SESSION_ENCRYPTION_KEYS, to accept payloads that aren't encrypted.
PLAIN = "plain"
_HOUR = 3_600_000  # milliseconds
_TOTAL_BYTES = 32 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Settings:
    """The checked settings of one ``Session`` on one application. Durations are in seconds."""

    store: object = None
    cookie_name: str = "session"
    key_prefix: str = "gsession:"
    id_length: int = 32
    token_factory: TokenFactory | None = None
    token_header: str | None = None
    idle_timeout: float = 7200.0
    absolute_timeout: float = 31 * 86400.0
    permanent_lifetime: float = 31 * 86400.0
    renew_interval: float | None = None
    newcomers_per_minute: int | None = 600
    newcomer_timeout: float = 300.0
    rotation_grace: float = 10.0
    renew_csrf: bool = False
    confirm_view: str | None = None
    remember: str = "cookie"
    remember_until: float | None = None
    store_timeout: float = 1.0
    pool_max: int = 100
    breaker_failures: int = 5
    breaker_pause: float = 1.0
    near_cache: float = 0.0
    near_cache_bytes: int = 64 * 1024 * 1024
    live_streams: int | None = None
    live_user_streams: int = 10
    live_heartbeat: float = 15.0
    live_stream_life: float = 300.0
    live_poll: float = 5.0
    edge_sync: float = 30.0
    logout_replicas: int = 0
    journal: bool = False
    journal_events: int = 1_000_000
    on_store_error: str = "fail"
    max_bytes: int = 1024 * 1024
    max_keys: int = 1000
    max_depth: int = 64
    spill_bytes: int | None = 16 * 1024
    spill_store: object = None
    max_value_bytes: int = 32 * 1024 * 1024
    max_total_bytes: int | None = None
    encryption_keys: tuple[bytes, ...] = ()
    read_plain: bool = False
    conflict: MergeFunction = last
    merge_policies: Mapping[str, MergeFunction] = field(default_factory=dict)
    lock_timeout: float = 10.0
    lock_wait: float = 5.0
    lock_waiters: int = 10
    lock_client_waiters: int | None = 10
    lock_warn: float | None = 1.0
    max_per_user: int | None = None
    max_policy: Literal["oldest", "refuse"] = "oldest"
    seen_interval: float = 300.0
    device_labels: bool = True
    user_values_lifetime: float = 365 * 86400.0
    schema: object = None
    permanent: bool = False
    imports: tuple[object, ...] = ()
    import_until: float | None = None
    import_watch: bool = False
    import_cookie_name: str | None = None
    import_cookie_domain: str | None = None
    import_cookie_path: str | None = None
    debug: bool = False
    debug_show: Collection[str] = ()
    #: Flask-Session's settings, if they are in the configuration
    flask_session: FlaskSessionSettings | None = None
    #: whether ``store`` follows from them
    store_follows: bool = False
    #: appended to SESSION_COOKIE_NAME
    cookie_suffix: str = ""

    def __repr__(self) -> str:
        """Hides the stores' URLs and the encryption keys."""
        hidden = {"store", "spill_store", "encryption_keys", "imports"}
        names = [f.name for f in fields(self) if f.name not in hidden]
        return f"Settings({', '.join(f'{name}={getattr(self, name)!r}' for name in names)})"

    @property
    def total_limit(self) -> int:
        """The limit in bytes for all large values of a session together."""
        if self.max_total_bytes is None:
            return max(_TOTAL_BYTES, self.max_value_bytes)
        return self.max_total_bytes

    def marks_end(self, now: int) -> int:
        """When marks of imported sessions expire, in milliseconds.

        With an end of the imports: an hour after it, which is longer than any request takes, and
        not before the oldest cookies are too old, since the end may be postponed. Without an end:
        longer than an old session and its successor can live together.
        """
        longest = max(self.permanent_lifetime, self.absolute_timeout)
        if self.import_until is not None:
            return max(int(self.import_until * 1000), now + int(longest * 1000)) + _HOUR
        return now + int(2 * longest * 1000) + _HOUR

    @property
    def remember_end(self) -> int:
        """When marks of converted remember-me cookies expire, in milliseconds."""
        return int((self.remember_until or 0) * 1000) + _HOUR

    def renew_interval_for(self, idle: float) -> float:
        """The renewal interval of a session with this idle timeout."""
        if self.renew_interval is None:
            return min(60.0, idle / 20)
        return min(self.renew_interval, idle)


Seconds = float | timedelta


class SettingKeywords(TypedDict, total=False):
    """The keywords of ``Session``, for editors and type checkers."""

    store: object
    cookie_name: str
    key_prefix: str
    id_length: int
    token_factory: TokenFactory | None
    token_header: str | None
    idle_timeout: Seconds
    absolute_timeout: Seconds
    permanent_lifetime: Seconds
    renew_interval: Seconds | None
    newcomers_per_minute: int | None
    newcomer_timeout: Seconds
    rotation_grace: Seconds
    renew_csrf: bool
    confirm_view: str | None
    remember: Literal["cookie", "session"]
    remember_until: str | date | float | None
    store_timeout: Seconds
    pool_max: int
    breaker_failures: int
    breaker_pause: Seconds
    near_cache: Seconds
    near_cache_bytes: int
    live_streams: int | None
    live_user_streams: int
    live_heartbeat: Seconds
    live_stream_life: Seconds
    live_poll: Seconds
    edge_sync: Seconds
    logout_replicas: int
    journal: bool
    journal_events: int
    on_store_error: Literal["fail", "keep-response"]
    max_bytes: int
    max_keys: int
    max_depth: int
    spill_bytes: int | None
    spill_store: object
    max_value_bytes: int
    max_total_bytes: int | None
    encryption_keys: str | bytes | Sequence[str | bytes] | None
    conflict: Literal["last", "reject"]
    merge_policies: Mapping[str, str | MergeFunction]
    lock_timeout: Seconds
    lock_wait: Seconds
    lock_waiters: int
    lock_client_waiters: int | None
    lock_warn: Seconds | None
    max_per_user: int | None
    max_policy: Literal["oldest", "refuse"]
    seen_interval: Seconds
    device_labels: bool
    user_values_lifetime: Seconds
    schema: object
    permanent: bool
    imports: Sequence[object] | None
    import_until: str | date | float | None
    import_watch: bool
    import_cookie_name: str | None
    import_cookie_domain: str | None
    import_cookie_path: str | None
    debug: bool
    debug_show: Collection[str]
