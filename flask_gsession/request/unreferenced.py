"""Large values that a request has written, and that no stored record may refer to yet."""

from __future__ import annotations

from collections.abc import Mapping

from ..repository.repository import BLOB_GRACE, Repository
from ..values.payload import Body
from ..values.references import Reference, names_in


class UnreferencedValues:
    """The large values of one request: put in places of their own, released when not needed."""

    __slots__ = ("_repository", "_until", "references")

    def __init__(self, repository: Repository) -> None:
        self._repository = repository
        #: by kind and digest; no record is known to refer to them
        self.references: dict[tuple[int, bytes], Reference] = {}
        self._until = 0  # the first of them expires, in milliseconds

    def add(self, reference: Reference, end: int) -> None:
        """This request wrote a large value, which is kept until ``end``."""
        if not self.references:
            self._until = end
        self.references[reference.kind, reference.digest] = reference

    def write_large(
        self, body: Body, absolute: int | None, before: Mapping[str, bytes]
    ) -> dict[str, bytes]:
        """The values of ``body`` with references to the large ones, written where they are not.

        ``absolute`` is where the session ends, None for a new one; ``before`` are the values as
        they are stored.
        """
        repository = self._repository
        values = body.values
        if not self.references and not repository.has_large_value(values, values):
            return values
        first: int | None = self._until if self.references else None

        def expires_at() -> int:
            nonlocal first
            end = repository.blobs_expire_at(body, absolute)
            first = end if first is None else first
            return end

        found = repository.write_large(body, expires_at, self.references, before)
        if self.references:
            end = expires_at()
            assert first is not None
            if first < end - BLOB_GRACE // 2:  # written long before
                repository.renew_blobs(self.references.values(), end)
                first = end
            self._until = first
        return found

    def replaced(
        self, before: Mapping[str, bytes] | None, after: Mapping[str, bytes] | None
    ) -> None:
        """A record with the values ``after`` replaced one with those ``before``.

        What the new one does not refer to stays for a while, for requests that still read it. With
        nothing after, the session ended, and nothing stays.
        """
        needed = names_in((after or {}).values())
        known = names_in((before or {}).values())
        self._repository.discard(known - needed, 0 if after is None else BLOB_GRACE)
        if self.references:
            self.stored(before or {})
            self.stored(after or {})

    def stored(self, values: Mapping[str, bytes]) -> None:
        """A record with these values was found: what it refers to is no longer this request's."""
        known = names_in(values.values())
        self.references = {
            same: ref for same, ref in self.references.items() if ref.name not in known
        }

    def drop(self, *, unsure: bool) -> None:
        """Release what no record refers to; nothing if that is ``unsure``."""
        if self.references and not unsure:
            self._repository.discard([reference.name for reference in self.references.values()], 0)
        self.references = {}
