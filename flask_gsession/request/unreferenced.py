"""Large values that a request has written, but that no stored record refers to yet."""

from __future__ import annotations

from collections.abc import Mapping

from ..repository.large_values import BLOB_GRACE
from ..repository.repository import Repository
from ..values.payload import Body
from ..values.references import Reference, names_in


class UnreferencedValues:
    """Tracks the large values that one request wrote, and releases them if no record needs them."""

    __slots__ = ("_repository", "_until", "references")

    def __init__(self, repository: Repository) -> None:
        self._repository = repository
        #: by kind and digest
        self.references: dict[tuple[int, bytes], Reference] = {}
        self._until = 0  # the earliest expiry, in milliseconds

    def add(self, reference: Reference, end: int) -> None:
        """Note a large value that this request wrote, and that the store keeps until ``end``."""
        if not self.references:
            self._until = end
        self.references[reference.kind, reference.digest] = reference

    def write_large(
        self, body: Body, absolute: int | None, before: Mapping[str, bytes]
    ) -> dict[str, bytes]:
        """Write large values unless that was done, and return all values with references to them.

        ``absolute``: the session's absolute end; None for a new session. ``before``: the stored
        values.
        """
        repository = self._repository
        values = body.values
        if not self.references and not repository.large.is_any_too_long(values, values):
            return values
        first: int | None = self._until if self.references else None

        def expires_at() -> int:
            nonlocal first
            end = repository.expiry.end_of_blobs(body, absolute)
            first = end if first is None else first
            return end

        found = repository.large.write(body, expires_at, self.references, before)
        if self.references:
            end = expires_at()
            assert first is not None
            if first < end - BLOB_GRACE // 2:  # written long ago
                repository.large.renew(self.references.values(), end)
                first = end
            self._until = first
        return found

    def release_replaced(
        self, before: Mapping[str, bytes] | None, after: Mapping[str, bytes] | None
    ) -> None:
        """Release large values after a record with values ``after`` replaced one with ``before``.

        Values that only the old record used stay for a minute, for requests that still read it. If
        the session ended (``after`` is None), they expire at once.
        """
        needed = names_in((after or {}).values())
        known = names_in((before or {}).values())
        self._repository.large.discard(known - needed, 0 if after is None else BLOB_GRACE)
        if self.references:
            self.mark_referenced(before or {})
            self.mark_referenced(after or {})

    def mark_referenced(self, values: Mapping[str, bytes]) -> None:
        """Note that a stored record refers to these values."""
        known = names_in(values.values())
        self.references = {
            same: ref for same, ref in self.references.items() if ref.name not in known
        }

    def release(self, *, unsure: bool) -> None:
        """Release the values that no record refers to. Does nothing if that is ``unsure``."""
        if self.references and not unsure:
            self._repository.large.discard(
                [reference.name for reference in self.references.values()], 0
            )
        self.references = {}
