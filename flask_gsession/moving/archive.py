"""The archive format: sessions as lines of JSON.

The first line names the format. Then there is one line per record, with its key, version, times
and payload exactly as stored: an encrypted payload stays encrypted. The frames of a record's large
values are lines before it. The last line holds the number of records and the SHA-256 of all lines
before it.

The reader validates each line: keys and names must be well formed, and a large value must belong to
the record that follows it. It can't verify the values of a session, so import only files that you
trust.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from typing import Annotated, Any, BinaryIO, NoReturn

import msgspec

from ..errors import GSessionError
from ..stores.base import Record
from ..values.large_values import stored_length
from ..values.marks import END_OF_TIME
from ..values.payload import Body
from ..values.references import reference_in, refers

FORMAT = 1
BEGINNING = b'{"flask_gsession"'  # how every archive begins
_FRAME, _FOOTER = b'{"blob"', b'{"records"'
_MAX_LINE = 32 * 1024 * 1024  # bytes

# msgspec searches for a pattern, and "$" would accept a trailing line break.
_Key = Annotated[str, msgspec.Meta(pattern=r"\A[A-Za-z0-9_-]{43}\Z")]
_Blob = Annotated[str, msgspec.Meta(pattern=r"\A[0-9a-f]{32}\Z")]
_Version = Annotated[int, msgspec.Meta(ge=1, le=(1 << 63) - 1)]
_Time = Annotated[int, msgspec.Meta(ge=0, lt=END_OF_TIME)]


class ArchiveError(GSessionError):
    """The file isn't an archive, or is truncated or altered."""


class Header(msgspec.Struct):
    """The first line."""

    flask_gsession: int
    session: str
    exported_at: str


class RecordLine(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    """A record, with the fields of ``Record`` in the same order."""

    key: _Key
    version: _Version
    created_at: _Time
    idle_expires_at: _Time
    absolute_expires_at: _Time
    payload: Annotated[bytes, msgspec.Meta(max_length=16 * 1024 * 1024)]  # in base64
    successor: _Key | None = None

    def __repr__(self) -> str:
        return f"<RecordLine {self.key}: {len(self.payload)} bytes>"

    def __rich_repr__(self) -> list[tuple[str, Any]]:
        return [("key", self.key)]


class Frame(msgspec.Struct, forbid_unknown_fields=True):
    """A piece of a large value of the session ``key``, whose record follows."""

    blob: _Blob
    offset: Annotated[int, msgspec.Meta(ge=0, lt=1 << 40)]
    frame: Annotated[bytes, msgspec.Meta(min_length=1)]  # in base64
    key: _Key
    version: _Version
    expires_at: _Time

    def __repr__(self) -> str:
        return f"<Frame of {self.blob}: {len(self.frame)} bytes>"

    def __rich_repr__(self) -> list[tuple[str, Any]]:
        return [("blob", self.blob)]


class _Footer(msgspec.Struct, forbid_unknown_fields=True):
    records: int
    sha256: str


_encode = msgspec.json.Encoder().encode
_decode_header = msgspec.json.Decoder(Header).decode
_decode_record = msgspec.json.Decoder(RecordLine).decode
_decode_frame = msgspec.json.Decoder(Frame).decode
_decode_footer = msgspec.json.Decoder(_Footer).decode
_MALFORMED = (msgspec.MsgspecError, UnicodeError, RecursionError)


class ArchiveWriter:
    """Writes an archive to a binary file."""

    def __init__(self, out: BinaryIO, session: str, exported_at: str) -> None:
        self._out = out
        self._digest = hashlib.sha256()
        self._records = 0
        self._write(Header(FORMAT, session, exported_at))

    def write_frame(self, frame: Frame) -> None:
        """Add a frame. All frames of a record come before it."""
        self._write(frame)

    def write_record(self, record: Record) -> None:
        """Add a record."""
        self._write(RecordLine(*record))
        self._records += 1

    def close(self) -> None:
        """Write the last line. Leaves the file open."""
        self._write(_Footer(self._records, self._digest.hexdigest()))

    def _write(self, line: object) -> None:
        data = _encode(line) + b"\n"
        self._digest.update(data)
        self._out.write(data)


def read_items(source: BinaryIO) -> Iterator[Record | Frame]:
    """The records and frames of an archive, from its beginning, without further checks.

    Check the file with ``check_archive`` first. Raises ``ArchiveError`` if it changed since.
    """
    source.seek(0)
    source.readline(_MAX_LINE)
    try:
        while not (line := source.readline(_MAX_LINE)).startswith(_FOOTER):
            yield _decode_item(line)
    except _MALFORMED:
        raise ArchiveError("the file changed during the import: run it again") from None


def _decode_item(line: bytes) -> Record | Frame:
    if line.startswith(_FRAME):
        return _decode_frame(line)
    return Record(*msgspec.structs.astuple(_decode_record(line)))


def check_archive(
    source: BinaryIO, read: Callable[[Record], Body | None], *, large_values: bool
) -> int:
    """Check the form of a whole archive. Returns the number of records.

    ``read`` is called with each record and returns its body, or None if it is unreadable: then its
    large values are skipped, too. ``large_values``: whether the store can keep large values. Raises
    ``ArchiveError``, which names the line.
    """
    return _Checker(source, read, large_values).run()


class _Checker:
    def __init__(
        self, source: BinaryIO, read: Callable[[Record], Body | None], large_values: bool
    ) -> None:
        self._source = source
        self._read = read
        self._large_values = large_values
        self._digest = hashlib.sha256()
        self._line = self._records = 0
        # About the frames since the last record: the key and version that they name, and the length
        # of each blob.
        self._owner: tuple[str, int] | None = None
        self._lengths: dict[str, int] = {}

    def run(self) -> int:
        self._source.seek(0)
        complete = False
        while line := self._source.readline(_MAX_LINE):
            self._line += 1
            if complete:
                self._fail("data after the last line")
            if not line.endswith(b"\n"):
                self._fail("truncated" if len(line) < _MAX_LINE else "the line is too long")
            try:
                complete = self._check(line)
            except _MALFORMED:
                self._fail("not a line of an export")
            self._digest.update(line)
        if not self._line:
            raise ArchiveError("the file is empty")
        if not complete:
            self._fail("truncated")
        return self._records

    def _check(self, line: bytes) -> bool:
        """Check one line; returns whether it is the last one."""
        if self._line == 1:
            version = _decode_header(line).flask_gsession
            if version != FORMAT:
                self._fail(f"format {version}; this version reads format {FORMAT}")
        elif line.startswith(_FOOTER):
            if _decode_footer(line) != _Footer(self._records, self._digest.hexdigest()):
                self._fail("checksum mismatch: the file was altered")
            self._require_owner(None)
            return True
        elif isinstance(item := _decode_item(line), Frame):
            self._check_frame(item)
        else:
            self._records += 1
            body = self._read(item)
            self._require_owner((item.key, item.version))
            if body is not None:
                self._check_lengths(body)
            self._owner, self._lengths = None, {}
        return False

    def _check_frame(self, frame: Frame) -> None:
        if not self._large_values:
            self._fail("a large value, which this store can't keep")
        owner = frame.key, frame.version
        self._require_owner(owner)
        if frame.offset != self._lengths.get(frame.blob, 0):
            self._fail("a piece of a large value in the wrong place")
        self._owner = owner
        self._lengths[frame.blob] = frame.offset + len(frame.frame)

    def _check_lengths(self, body: Body) -> None:
        if self._owner is None:
            return
        references = [reference_in(raw) for raw in body.values.values() if refers(raw)]
        allowed = {each.name: stored_length(each) for each in references}
        if any(length > allowed.get(name, 0) for name, length in self._lengths.items()):
            self._fail("a large value that its session doesn't have, or that is longer there")

    def _require_owner(self, owner: tuple[str, int] | None) -> None:
        if self._owner not in (None, owner):
            self._fail("a large value without its session")

    def _fail(self, problem: str) -> NoReturn:
        raise ArchiveError(f"line {self._line}: {problem}")
