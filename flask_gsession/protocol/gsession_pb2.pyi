from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Record(_message.Message):
    __slots__ = ("key", "version", "created_at", "idle_expires_at", "absolute_expires_at", "payload", "successor")
    KEY_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    CREATED_AT_FIELD_NUMBER: _ClassVar[int]
    IDLE_EXPIRES_AT_FIELD_NUMBER: _ClassVar[int]
    ABSOLUTE_EXPIRES_AT_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    SUCCESSOR_FIELD_NUMBER: _ClassVar[int]
    key: str
    version: int
    created_at: int
    idle_expires_at: int
    absolute_expires_at: int
    payload: bytes
    successor: str
    def __init__(self, key: _Optional[str] = ..., version: _Optional[int] = ..., created_at: _Optional[int] = ..., idle_expires_at: _Optional[int] = ..., absolute_expires_at: _Optional[int] = ..., payload: _Optional[bytes] = ..., successor: _Optional[str] = ...) -> None: ...

class Done(_message.Message):
    __slots__ = ("done",)
    DONE_FIELD_NUMBER: _ClassVar[int]
    done: bool
    def __init__(self, done: bool = ...) -> None: ...

class Flag(_message.Message):
    __slots__ = ("value",)
    VALUE_FIELD_NUMBER: _ClassVar[int]
    value: bool
    def __init__(self, value: bool = ...) -> None: ...

class Absent(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Error(_message.Message):
    __slots__ = ("kind", "detail", "retry_after", "contention", "asked", "reason")
    KIND_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    RETRY_AFTER_FIELD_NUMBER: _ClassVar[int]
    CONTENTION_FIELD_NUMBER: _ClassVar[int]
    ASKED_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    kind: str
    detail: str
    retry_after: int
    contention: bool
    asked: bool
    reason: str
    def __init__(self, kind: _Optional[str] = ..., detail: _Optional[str] = ..., retry_after: _Optional[int] = ..., contention: bool = ..., asked: bool = ..., reason: _Optional[str] = ...) -> None: ...

class HelloRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class HelloReply(_message.Message):
    __slots__ = ("parts", "confirms_logouts", "done")
    PARTS_FIELD_NUMBER: _ClassVar[int]
    CONFIRMS_LOGOUTS_FIELD_NUMBER: _ClassVar[int]
    DONE_FIELD_NUMBER: _ClassVar[int]
    parts: _containers.RepeatedScalarFieldContainer[str]
    confirms_logouts: bool
    done: bool
    def __init__(self, parts: _Optional[_Iterable[str]] = ..., confirms_logouts: bool = ..., done: bool = ...) -> None: ...

class CreateRequest(_message.Message):
    __slots__ = ("record",)
    RECORD_FIELD_NUMBER: _ClassVar[int]
    record: Record
    def __init__(self, record: _Optional[_Union[Record, _Mapping]] = ...) -> None: ...

class LoadRequest(_message.Message):
    __slots__ = ("key", "name_server")
    KEY_FIELD_NUMBER: _ClassVar[int]
    NAME_SERVER_FIELD_NUMBER: _ClassVar[int]
    key: str
    name_server: bool
    def __init__(self, key: _Optional[str] = ..., name_server: bool = ...) -> None: ...

class LoadReply(_message.Message):
    __slots__ = ("record", "absent", "server")
    RECORD_FIELD_NUMBER: _ClassVar[int]
    ABSENT_FIELD_NUMBER: _ClassVar[int]
    SERVER_FIELD_NUMBER: _ClassVar[int]
    record: Record
    absent: Absent
    server: int
    def __init__(self, record: _Optional[_Union[Record, _Mapping]] = ..., absent: _Optional[_Union[Absent, _Mapping]] = ..., server: _Optional[int] = ...) -> None: ...

class SaveRequest(_message.Message):
    __slots__ = ("record", "expected_version", "shorten", "lease")
    RECORD_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_VERSION_FIELD_NUMBER: _ClassVar[int]
    SHORTEN_FIELD_NUMBER: _ClassVar[int]
    LEASE_FIELD_NUMBER: _ClassVar[int]
    record: Record
    expected_version: int
    shorten: bool
    lease: str
    def __init__(self, record: _Optional[_Union[Record, _Mapping]] = ..., expected_version: _Optional[int] = ..., shorten: bool = ..., lease: _Optional[str] = ...) -> None: ...

class RenewRequest(_message.Message):
    __slots__ = ("record", "idle_expires_at")
    RECORD_FIELD_NUMBER: _ClassVar[int]
    IDLE_EXPIRES_AT_FIELD_NUMBER: _ClassVar[int]
    record: Record
    idle_expires_at: int
    def __init__(self, record: _Optional[_Union[Record, _Mapping]] = ..., idle_expires_at: _Optional[int] = ...) -> None: ...

class ReplaceRequest(_message.Message):
    __slots__ = ("key", "record", "expected_version", "pointer", "shorten", "lease")
    KEY_FIELD_NUMBER: _ClassVar[int]
    RECORD_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_VERSION_FIELD_NUMBER: _ClassVar[int]
    POINTER_FIELD_NUMBER: _ClassVar[int]
    SHORTEN_FIELD_NUMBER: _ClassVar[int]
    LEASE_FIELD_NUMBER: _ClassVar[int]
    key: str
    record: Record
    expected_version: int
    pointer: Record
    shorten: bool
    lease: str
    def __init__(self, key: _Optional[str] = ..., record: _Optional[_Union[Record, _Mapping]] = ..., expected_version: _Optional[int] = ..., pointer: _Optional[_Union[Record, _Mapping]] = ..., shorten: bool = ..., lease: _Optional[str] = ...) -> None: ...

class ReplaceReply(_message.Message):
    __slots__ = ("unconfirmed",)
    UNCONFIRMED_FIELD_NUMBER: _ClassVar[int]
    unconfirmed: str
    def __init__(self, unconfirmed: _Optional[str] = ...) -> None: ...

class DeleteRequest(_message.Message):
    __slots__ = ("key", "expected_version", "lease", "reason", "by")
    KEY_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_VERSION_FIELD_NUMBER: _ClassVar[int]
    LEASE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    BY_FIELD_NUMBER: _ClassVar[int]
    key: str
    expected_version: int
    lease: str
    reason: str
    by: str
    def __init__(self, key: _Optional[str] = ..., expected_version: _Optional[int] = ..., lease: _Optional[str] = ..., reason: _Optional[str] = ..., by: _Optional[str] = ...) -> None: ...

class DeleteReply(_message.Message):
    __slots__ = ("found", "record", "unconfirmed")
    FOUND_FIELD_NUMBER: _ClassVar[int]
    RECORD_FIELD_NUMBER: _ClassVar[int]
    UNCONFIRMED_FIELD_NUMBER: _ClassVar[int]
    found: bool
    record: Record
    unconfirmed: str
    def __init__(self, found: bool = ..., record: _Optional[_Union[Record, _Mapping]] = ..., unconfirmed: _Optional[str] = ...) -> None: ...

class SettleRequest(_message.Message):
    __slots__ = ("versions",)
    VERSIONS_FIELD_NUMBER: _ClassVar[int]
    versions: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, versions: _Optional[_Iterable[int]] = ...) -> None: ...

class AcquireRequest(_message.Message):
    __slots__ = ("key", "owner", "lease_ms", "max_waiters")
    KEY_FIELD_NUMBER: _ClassVar[int]
    OWNER_FIELD_NUMBER: _ClassVar[int]
    LEASE_MS_FIELD_NUMBER: _ClassVar[int]
    MAX_WAITERS_FIELD_NUMBER: _ClassVar[int]
    key: str
    owner: str
    lease_ms: int
    max_waiters: int
    def __init__(self, key: _Optional[str] = ..., owner: _Optional[str] = ..., lease_ms: _Optional[int] = ..., max_waiters: _Optional[int] = ...) -> None: ...

class AcquireReply(_message.Message):
    __slots__ = ("wait_ms",)
    WAIT_MS_FIELD_NUMBER: _ClassVar[int]
    wait_ms: int
    def __init__(self, wait_ms: _Optional[int] = ...) -> None: ...

class ExtendRequest(_message.Message):
    __slots__ = ("key", "owner", "lease_ms")
    KEY_FIELD_NUMBER: _ClassVar[int]
    OWNER_FIELD_NUMBER: _ClassVar[int]
    LEASE_MS_FIELD_NUMBER: _ClassVar[int]
    key: str
    owner: str
    lease_ms: int
    def __init__(self, key: _Optional[str] = ..., owner: _Optional[str] = ..., lease_ms: _Optional[int] = ...) -> None: ...

class ReleaseRequest(_message.Message):
    __slots__ = ("key", "owner")
    KEY_FIELD_NUMBER: _ClassVar[int]
    OWNER_FIELD_NUMBER: _ClassVar[int]
    key: str
    owner: str
    def __init__(self, key: _Optional[str] = ..., owner: _Optional[str] = ...) -> None: ...

class WaitForReleaseRequest(_message.Message):
    __slots__ = ("key", "owner", "seconds")
    KEY_FIELD_NUMBER: _ClassVar[int]
    OWNER_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    key: str
    owner: str
    seconds: float
    def __init__(self, key: _Optional[str] = ..., owner: _Optional[str] = ..., seconds: _Optional[float] = ...) -> None: ...

class WriteFrameRequest(_message.Message):
    __slots__ = ("name", "offset", "frame", "expires_at")
    NAME_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    FRAME_FIELD_NUMBER: _ClassVar[int]
    EXPIRES_AT_FIELD_NUMBER: _ClassVar[int]
    name: str
    offset: int
    frame: bytes
    expires_at: int
    def __init__(self, name: _Optional[str] = ..., offset: _Optional[int] = ..., frame: _Optional[bytes] = ..., expires_at: _Optional[int] = ...) -> None: ...

class ReadFrameRequest(_message.Message):
    __slots__ = ("name", "offset", "size")
    NAME_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    name: str
    offset: int
    size: int
    def __init__(self, name: _Optional[str] = ..., offset: _Optional[int] = ..., size: _Optional[int] = ...) -> None: ...

class ReadFrameReply(_message.Message):
    __slots__ = ("frame", "absent")
    FRAME_FIELD_NUMBER: _ClassVar[int]
    ABSENT_FIELD_NUMBER: _ClassVar[int]
    frame: bytes
    absent: Absent
    def __init__(self, frame: _Optional[bytes] = ..., absent: _Optional[_Union[Absent, _Mapping]] = ...) -> None: ...

class BlobsRequest(_message.Message):
    __slots__ = ("names", "at")
    NAMES_FIELD_NUMBER: _ClassVar[int]
    AT_FIELD_NUMBER: _ClassVar[int]
    names: _containers.RepeatedScalarFieldContainer[str]
    at: int
    def __init__(self, names: _Optional[_Iterable[str]] = ..., at: _Optional[int] = ...) -> None: ...

class ScanRequest(_message.Message):
    __slots__ = ("cursor", "limit", "begins")
    CURSOR_FIELD_NUMBER: _ClassVar[int]
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    BEGINS_FIELD_NUMBER: _ClassVar[int]
    cursor: str
    limit: int
    begins: str
    def __init__(self, cursor: _Optional[str] = ..., limit: _Optional[int] = ..., begins: _Optional[str] = ...) -> None: ...

class ScanReply(_message.Message):
    __slots__ = ("records", "unreadable", "cursor")
    RECORDS_FIELD_NUMBER: _ClassVar[int]
    UNREADABLE_FIELD_NUMBER: _ClassVar[int]
    CURSOR_FIELD_NUMBER: _ClassVar[int]
    records: _containers.RepeatedCompositeFieldContainer[Record]
    unreadable: _containers.RepeatedScalarFieldContainer[str]
    cursor: str
    def __init__(self, records: _Optional[_Iterable[_Union[Record, _Mapping]]] = ..., unreadable: _Optional[_Iterable[str]] = ..., cursor: _Optional[str] = ...) -> None: ...

class TidyRequest(_message.Message):
    __slots__ = ("cursor", "limit", "dry_run")
    CURSOR_FIELD_NUMBER: _ClassVar[int]
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    DRY_RUN_FIELD_NUMBER: _ClassVar[int]
    cursor: str
    limit: int
    dry_run: bool
    def __init__(self, cursor: _Optional[str] = ..., limit: _Optional[int] = ..., dry_run: bool = ...) -> None: ...

class TidyReply(_message.Message):
    __slots__ = ("found", "seen", "cursor")
    class FoundEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    FOUND_FIELD_NUMBER: _ClassVar[int]
    SEEN_FIELD_NUMBER: _ClassVar[int]
    CURSOR_FIELD_NUMBER: _ClassVar[int]
    found: _containers.ScalarMap[str, int]
    seen: int
    cursor: str
    def __init__(self, found: _Optional[_Mapping[str, int]] = ..., seen: _Optional[int] = ..., cursor: _Optional[str] = ...) -> None: ...

class CountRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class CountReply(_message.Message):
    __slots__ = ("count",)
    COUNT_FIELD_NUMBER: _ClassVar[int]
    count: int
    def __init__(self, count: _Optional[int] = ...) -> None: ...

class CheckRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class CheckReply(_message.Message):
    __slots__ = ("findings", "done")
    FINDINGS_FIELD_NUMBER: _ClassVar[int]
    DONE_FIELD_NUMBER: _ClassVar[int]
    findings: _containers.RepeatedCompositeFieldContainer[Finding]
    done: bool
    def __init__(self, findings: _Optional[_Iterable[_Union[Finding, _Mapping]]] = ..., done: bool = ...) -> None: ...

class Finding(_message.Message):
    __slots__ = ("severity", "check", "found", "advice")
    SEVERITY_FIELD_NUMBER: _ClassVar[int]
    CHECK_FIELD_NUMBER: _ClassVar[int]
    FOUND_FIELD_NUMBER: _ClassVar[int]
    ADVICE_FIELD_NUMBER: _ClassVar[int]
    severity: str
    check: str
    found: str
    advice: str
    def __init__(self, severity: _Optional[str] = ..., check: _Optional[str] = ..., found: _Optional[str] = ..., advice: _Optional[str] = ...) -> None: ...

class WatchRequest(_message.Message):
    __slots__ = ("interval", "beat", "name_server")
    INTERVAL_FIELD_NUMBER: _ClassVar[int]
    BEAT_FIELD_NUMBER: _ClassVar[int]
    NAME_SERVER_FIELD_NUMBER: _ClassVar[int]
    interval: float
    beat: int
    name_server: bool
    def __init__(self, interval: _Optional[float] = ..., beat: _Optional[int] = ..., name_server: bool = ...) -> None: ...

class WatchReply(_message.Message):
    __slots__ = ("started", "keys", "beat", "server")
    STARTED_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    BEAT_FIELD_NUMBER: _ClassVar[int]
    SERVER_FIELD_NUMBER: _ClassVar[int]
    started: bool
    keys: _containers.RepeatedScalarFieldContainer[str]
    beat: int
    server: int
    def __init__(self, started: bool = ..., keys: _Optional[_Iterable[str]] = ..., beat: _Optional[int] = ..., server: _Optional[int] = ...) -> None: ...

class Value(_message.Message):
    __slots__ = ("null", "boolean", "integer", "number", "text", "data", "list", "map", "typed")
    NULL_FIELD_NUMBER: _ClassVar[int]
    BOOLEAN_FIELD_NUMBER: _ClassVar[int]
    INTEGER_FIELD_NUMBER: _ClassVar[int]
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    LIST_FIELD_NUMBER: _ClassVar[int]
    MAP_FIELD_NUMBER: _ClassVar[int]
    TYPED_FIELD_NUMBER: _ClassVar[int]
    null: Absent
    boolean: bool
    integer: int
    number: float
    text: str
    data: bytes
    list: List
    map: Map
    typed: Typed
    def __init__(self, null: _Optional[_Union[Absent, _Mapping]] = ..., boolean: bool = ..., integer: _Optional[int] = ..., number: _Optional[float] = ..., text: _Optional[str] = ..., data: _Optional[bytes] = ..., list: _Optional[_Union[List, _Mapping]] = ..., map: _Optional[_Union[Map, _Mapping]] = ..., typed: _Optional[_Union[Typed, _Mapping]] = ...) -> None: ...

class List(_message.Message):
    __slots__ = ("items",)
    ITEMS_FIELD_NUMBER: _ClassVar[int]
    items: _containers.RepeatedCompositeFieldContainer[Value]
    def __init__(self, items: _Optional[_Iterable[_Union[Value, _Mapping]]] = ...) -> None: ...

class Map(_message.Message):
    __slots__ = ("items",)
    class ItemsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: Value
        def __init__(self, key: _Optional[str] = ..., value: _Optional[_Union[Value, _Mapping]] = ...) -> None: ...
    ITEMS_FIELD_NUMBER: _ClassVar[int]
    items: _containers.MessageMap[str, Value]
    def __init__(self, items: _Optional[_Mapping[str, Value]] = ...) -> None: ...

class Typed(_message.Message):
    __slots__ = ("type", "text")
    TYPE_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    type: str
    text: str
    def __init__(self, type: _Optional[str] = ..., text: _Optional[str] = ...) -> None: ...

class VerifyRequest(_message.Message):
    __slots__ = ("cookie",)
    COOKIE_FIELD_NUMBER: _ClassVar[int]
    cookie: str
    def __init__(self, cookie: _Optional[str] = ...) -> None: ...

class VerifyReply(_message.Message):
    __slots__ = ("active", "user", "expires_at")
    ACTIVE_FIELD_NUMBER: _ClassVar[int]
    USER_FIELD_NUMBER: _ClassVar[int]
    EXPIRES_AT_FIELD_NUMBER: _ClassVar[int]
    active: bool
    user: str
    expires_at: int
    def __init__(self, active: bool = ..., user: _Optional[str] = ..., expires_at: _Optional[int] = ...) -> None: ...

class GetRequest(_message.Message):
    __slots__ = ("cookie", "keys")
    COOKIE_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    cookie: str
    keys: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, cookie: _Optional[str] = ..., keys: _Optional[_Iterable[str]] = ...) -> None: ...

class GetReply(_message.Message):
    __slots__ = ("values", "found")
    class ValuesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: Value
        def __init__(self, key: _Optional[str] = ..., value: _Optional[_Union[Value, _Mapping]] = ...) -> None: ...
    VALUES_FIELD_NUMBER: _ClassVar[int]
    FOUND_FIELD_NUMBER: _ClassVar[int]
    values: _containers.MessageMap[str, Value]
    found: bool
    def __init__(self, values: _Optional[_Mapping[str, Value]] = ..., found: bool = ...) -> None: ...

class PutRequest(_message.Message):
    __slots__ = ("cookie", "changes", "removals")
    class ChangesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: Value
        def __init__(self, key: _Optional[str] = ..., value: _Optional[_Union[Value, _Mapping]] = ...) -> None: ...
    COOKIE_FIELD_NUMBER: _ClassVar[int]
    CHANGES_FIELD_NUMBER: _ClassVar[int]
    REMOVALS_FIELD_NUMBER: _ClassVar[int]
    cookie: str
    changes: _containers.MessageMap[str, Value]
    removals: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, cookie: _Optional[str] = ..., changes: _Optional[_Mapping[str, Value]] = ..., removals: _Optional[_Iterable[str]] = ...) -> None: ...

class PutReply(_message.Message):
    __slots__ = ("stored",)
    STORED_FIELD_NUMBER: _ClassVar[int]
    stored: bool
    def __init__(self, stored: bool = ...) -> None: ...

class RevokeRequest(_message.Message):
    __slots__ = ("cookie",)
    COOKIE_FIELD_NUMBER: _ClassVar[int]
    cookie: str
    def __init__(self, cookie: _Optional[str] = ...) -> None: ...

class RevokeReply(_message.Message):
    __slots__ = ("ended",)
    ENDED_FIELD_NUMBER: _ClassVar[int]
    ended: bool
    def __init__(self, ended: bool = ...) -> None: ...
