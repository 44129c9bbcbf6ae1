"""Takes over old sessions of Flask-Session without a request, one record after the other.

It takes the same steps as a request (see ``takeover``), up to the mark. The mark names the session
and holds the nonce, so the browser's next request with the old cookie finds both and derives the
token. That request also enters the session in its user's roster. Until then, a revocation ends it
through the roster's epoch, and it doesn't count towards the user's limit.
"""

from __future__ import annotations

from collections import Counter

from ..errors import UnreadableRecord
from ..repository.permanent import PERMANENT
from ..repository.repository import Repository
from ..stores.foreign import Foreign, Together
from ..tokens import Token
from ..users.roster import Since
from .contents import RefusedContents
from .drafting import draft_session, new_key
from .flask_session import FlaskSessionSource
from .mark import new_nonce
from .pickle_process import PickleProcess
from .source import Contents, OldRecord
from .takeover import Finding, Takeover

TAKEN_OVER = "taken over"


class Migration:
    """Takes over the records of ``source``, and counts the outcomes.

    ``pickles``: reads the pickles that name a class; without it, they are refused. ``repository``:
    for the new sessions; with ``dry_run``, nothing is written to it.
    """

    def __init__(
        self,
        repository: Repository,
        takeover: Takeover,
        source: FlaskSessionSource,
        *,
        pickles: PickleProcess | None = None,
        dry_run: bool = False,
    ) -> None:
        self._repository = repository
        self._takeover = takeover
        self._source = _Offline(source, pickles)
        self._dry_run = dry_run
        self.outcomes: Counter[str] = Counter()
        #: how many sessions lose a key, by the key's name
        self.dropped: Counter[str] = Counter()
        #: sessions that can't be taken over
        self.lost = 0
        #: the latest end of an old session, in milliseconds
        self.latest_end = 0

    def take_over(self, name: str) -> None:
        """Take over one old record, unless it was taken over before. Raises ``StoreUnavailable``.

        At most four round trips; two if it was taken over before.
        """
        try:
            outcome, dropped = self._outcome(Token(name))
        except UnreadableRecord as error:
            outcome, dropped = f"unreadable ({error.detail or error.reason})", ()
            self.lost += 1
        except RefusedContents as error:
            outcome, dropped = f"refused ({error})", ()
            self.lost += 1
        self.outcomes[outcome] += 1
        self.dropped.update(dropped)

    def _outcome(self, name: str) -> tuple[str, tuple[str, ...]]:
        repository, source = self._repository, self._source
        found = self._takeover.find(repository, source, name, "")
        if found.mark is not None:
            return "already", ()
        if found.old is None:
            return "expired", ()
        self.latest_end = max(self.latest_end, found.old.expires_at or 0)
        if self._dry_run:
            return self._predict(found, found.old)
        created = self._takeover.create(repository, source, found, found.old)
        if created.mark is None:
            return "empty", ()
        return ("already" if created.made is None else TAKEN_OVER), created.dropped

    def _predict(self, found: Finding, old: OldRecord) -> tuple[str, tuple[str, ...]]:
        repository = self._repository
        contents = self._source.contents(repository, old)
        if len(contents.values) <= (PERMANENT in contents.values):
            return "empty", ()
        if repository.large.is_any_too_long(contents.values, contents.values):
            return TAKEN_OVER, contents.dropped  # drafting would write large values
        key, origin = new_key(
            repository, self._source.label, found.name, new_nonce(), old.expires_at
        )
        return TAKEN_OVER, draft_session(repository, key, contents, origin, False)[1]


class _Offline:
    """A source whose sessions keep their expiry, since this isn't a use of them."""

    def __init__(self, source: FlaskSessionSource, pickles: PickleProcess | None) -> None:
        self._source = source
        self._pickles = pickles
        self.label = source.label
        self.together: Together | None = source.together

    def name_of(self, cookie: str) -> str | None:
        return self._source.name_of(cookie)

    def load(self, name: str, cookie: str) -> OldRecord | None:
        return self._source.load(name, cookie)

    def old(self, name: str, found: Foreign | None) -> OldRecord | None:
        return self._source.old(name, found)

    def contents(self, repository: Repository, old: OldRecord) -> Contents:
        return self._read(repository, old)._replace(idle_ends=old.expires_at)

    def is_of_one_visitor(self, old: OldRecord) -> bool:
        return self._source.is_of_one_visitor(old)

    def since(self, old: OldRecord) -> Since:
        return self._source.since(old)

    def delete(self, name: str) -> None:
        self._source.delete(name)

    def _read(self, repository: Repository, old: OldRecord) -> Contents:
        try:
            return self._source.contents(repository, old)
        except RefusedContents as error:
            if self._pickles is None or not str(error).startswith("pickle: operation"):
                raise
        assert isinstance(old.stored, Foreign)
        return self._pickles.contents(repository, old.stored.value)
