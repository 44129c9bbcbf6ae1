"""Writes all sessions of a store to an archive."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from typing import BinaryIO

from ..errors import UnreadableRecord, ValueLost
from ..repository.large_values import BLOB_GRACE
from ..repository.repository import Repository
from ..repository.scanning import all_pages
from ..repository.user_values import is_user_values
from ..stores.base import Record, is_session_key
from ..stores.parts import Page, Scans
from ..values.references import reference_in, refers
from .archive import ArchiveWriter, Frame
from .lasting import may_outlive_sessions, outlives_sessions


class Exporter:
    """Writes all sessions and the values of users to an archive.

    During an import, this includes the records that keep old cookies invalid.
    """

    def __init__(self, repository: Repository) -> None:
        self._repository = repository
        #: records written
        self.records = 0
        #: keys that hold no valid record; they are not in the archive
        self.unreadable = 0
        #: sessions in the archive that lack a large value
        self.incomplete = 0

    def pages(self, scans: Scans) -> Iterator[Page]:
        """The records to write."""
        for page in all_pages(scans, wanted=may_outlive_sessions):
            records = [record for record in page.records if self._is_wanted(record)]
            unreadable = [key for key in page.unreadable if self._may_be_wanted(key)]
            yield page._replace(records=records, unreadable=unreadable)

    def _is_wanted(self, record: Record) -> bool:
        repository = self._repository
        if is_session_key(record.key) or is_user_values(repository, record, for_others=True):
            return True
        return repository.imports is not None and outlives_sessions(repository, record)

    def _may_be_wanted(self, key: str) -> bool:
        return is_session_key(key) or self._repository.imports is not None

    def write(self, pages: Iterable[Page], out: BinaryIO) -> Iterator[int]:
        """Write the archive. Yields the number of records on each page."""
        repository = self._repository
        now = datetime.fromtimestamp(repository.now() // 1000, UTC)
        name = repository.live.cookie_name()
        archive = ArchiveWriter(out, name, now.isoformat().replace("+00:00", "Z"))
        for page in pages:
            self.unreadable += len(page.unreadable)
            for record in page.records:
                try:
                    for frame in self._frames(record):
                        archive.write_frame(frame)
                except ValueLost:
                    self.incomplete += 1
                archive.write_record(record)
            self.records += len(page.records)
            yield len(page.records)
        archive.close()

    def _frames(self, record: Record) -> Iterator[Frame]:
        """The large values of a record as stored. Raises ``ValueLost``."""
        repository = self._repository
        try:
            body = repository.records.read(record.key, record)
            values = body.values.values() if body is not None and body.has_large else ()
            references = [reference_in(raw) for raw in values if refers(raw)]
        except UnreadableRecord:  # the importing application may be able to read it
            return
        end = record.idle_expires_at + BLOB_GRACE
        for reference in references:
            if repository.large.storage is None:
                raise ValueLost("missing")
            for offset, frame in repository.large.storage.stored(reference):
                yield Frame(reference.name, offset, frame, record.key, record.version, end)
