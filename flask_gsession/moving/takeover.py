"""Takes over an old session exactly once, in the first request that needs it.

``tests/simulation/importing.py`` is a model of the protocol and its invariants. A request without a
valid new cookie, but with an old one:

1. loads the old record, then the mark (see ``mark``), in this order: a logout deletes the old
record only while the mark is there, so if neither is found, there is no session; 2. without a mark:
creates the session under a fresh key, then the mark. If the mark exists already: deletes its own
session, and continues with the session that the mark names; 3. with a mark: loads the session that
it names. If that ended, the old cookie stays invalid; 4. if the session names a user: enters it in
the user's roster; 5. responds with the token, which every request with this old cookie can compute.

Several visitors may have the same Flask cookie; ``shared_cookies`` says what changes then.

A logout deletes the old record, then the session. The mark stays until the imports end.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple, TypeVar

from flask import Request, Response
from msgspec.structs import replace

from ..errors import KeyTaken, LogoutUnconfirmed, StoreUnavailable, UnreadableRecord
from ..events import ImportRefused, SessionImported, logger
from ..repository.ending import delete_session
from ..repository.imports import TakenOver
from ..repository.permanent import PERMANENT
from ..repository.repository import Loaded, Repository
from ..stores.base import Record, Store
from ..stores.support import because
from ..stores.wrappers.breaker import Circuit
from ..tokens import Token
from ..users.roster import Since
from ..users.rosters import network_of
from ..values.payload import Body, Origin
from ..values.references import names_in
from . import shared_cookies
from .contents import RefusedContents
from .drafting import draft_session, new_key
from .entering import enter
from .flask_cookies import LABEL as COOKIES
from .mark import Mark, mark_key, new_nonce, open_origin, read_mark, token_for
from .source import OldRecord, Source

T = TypeVar("T")

NOTHING = TakenOver()
_DEAD = TakenOver(dead_cookie=True)
_STAYS = "It stays where it is"
_ADVICE = (
    ". Sessions like this one are taken over by: flask gsession migrate --from flask-session "
    "--pickle"
)
#: The form of the cookies that Flask, Flask-Session and we issue, under any settings.
_ISSUED = re.compile(r"(?=.{11})\.?[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+){0,2}")
_UNKNOWN = (
    "unknown cookie",
    "It has another signature or form, or is too old. It stays in the browser: if SECRET_KEY, "
    "SESSION_USE_SIGNER or SESSION_ID_LENGTH has changed, change it back, and nobody is logged "
    "out",
)


class OldCookie(NamedTuple):
    """The old cookie: its name, and the attributes needed to delete it.

    Browsers refuse to delete some cookies without ``Secure`` or ``Partitioned``.
    """

    name: str
    attributes: Mapping[str, Any]


class Finding(NamedTuple):
    """The result of step 1."""

    name: str
    key: str  # of the mark
    old: OldRecord | None
    mark: Mark | None
    record: Record | None = None  # of the mark

    def __repr__(self) -> str:
        return f"<Finding {self.key}>"


class Created(NamedTuple):
    """The result of step 2. ``dropped``: the keys that were left out."""

    made: Loaded | None
    mark: Mark | None
    dropped: tuple[str, ...] = ()
    record: Record | None = None  # of the mark


class Takeover:
    """Takes sessions over from the first of ``sources`` that recognises the old cookie.

    ``circuit``: the circuit breaker for calls to old stores. ``opened``: the stores that were
    opened for the sources. ``knows_users``: whether Flask-Login is in use. ``until``: the end of
    imports, in milliseconds; None: no end. ``watch``: whether a session ends if its old record
    disappears early. ``at_url``: opens Flask-Session's store at another URL.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        cookie: OldCookie,
        *,
        circuit: Circuit | None = None,
        opened: Sequence[Store] = (),
        knows_users: Callable[[], bool],
        until: int | None,
        watch: bool = False,
        at_url: Callable[[str], Source] | None = None,
    ) -> None:
        self.cookie = cookie
        self.until = until
        self._at_url = at_url
        self._opened = opened
        self._circuit = circuit
        self._knows_users = knows_users
        self._sources = tuple(sources)
        self._watch = watch
        self._reported: set[tuple[str, str]] = set()

    # -- for requests

    def take_over(self, repository: Repository, request: Request) -> TakenOver:
        """The session for the request's old cookie. Creates it, unless an earlier request did.

        Raises ``StoreUnavailable``. At most four round trips, two if the old records are on the
        same Redis server as the new ones; two for an existing session. None without an old cookie,
        or for a malformed one.
        """
        # Old ids are secrets as well, so keep them out of tracebacks.
        text = Token(request.cookies.get(self.cookie.name, ""))
        if not text or self.is_over(repository.now()):
            return NOTHING
        outcome, known = _DEAD, False
        for source in self._sources:
            name = Token(source.name_of(text) or "")
            if not name:
                continue
            known = True
            try:
                outcome = self._by(repository, source, name, text, _network(request))
            except UnreadableRecord as error:
                self._refuse(repository, source, error.detail or error.reason, _STAYS)
                return NOTHING
            except RefusedContents as error:
                advice = _STAYS if source.label == COOKIES else _STAYS + _ADVICE
                self._refuse(repository, source, str(error), advice)
                return NOTHING
            if not outcome.dead_cookie:
                break
        if not known and _ISSUED.fullmatch(text):
            self._refuse(repository, self._sources[0], *_UNKNOWN)
            return NOTHING
        return outcome

    def may_set_cookie(
        self, repository: Repository, mark: Record, began: int, *, wrote: bool
    ) -> bool:
        """Whether a request may set our cookie: see ``shared_cookies``."""
        return shared_cookies.may_set_cookie(repository, mark, began, wrote=wrote)

    def end_old(self, repository: Repository, body: Body) -> None:
        """Remove the old record of this session, which is ending. Raises ``StoreUnavailable``."""
        if body.origin is None or self.is_over(repository.now()):
            return
        try:
            for source, name in self._of(repository, body.origin):
                self._asked(source.delete, name)
            if body.origin.label == COOKIES:
                shared_cookies.end(repository, body.origin)
        except StoreUnavailable:
            if not repository.is_cut_off:  # otherwise this is called when the edge settles the end
                raise

    def end_presented(self, repository: Repository, request: Request, body: Body | None) -> None:
        """Remove the record that the request's old cookie names, unless ``end_old`` removes it.

        Raises ``StoreUnavailable``. One round trip; none without such a cookie.
        """
        text = Token(request.cookies.get(self.cookie.name, ""))
        if not text or self.is_over(repository.now()):
            return
        known = None if body is None or body.origin is None else body.origin.mark
        for source in self._sources:
            name = Token(source.name_of(text) or "")
            if name and mark_key(source.label, name) != known:
                self._asked(source.delete, name)

    def has_ended(self, repository: Repository, body: Body) -> bool:
        """Whether an old worker ended this session: its record disappeared before its expiry.

        Always False unless old records are watched. Raises ``StoreUnavailable``. One round trip.
        """
        origin, now = body.origin, repository.now()
        if not self._watch or origin is None or self.is_over(now):
            return False
        if origin.expires_at is None or now >= origin.expires_at:
            return False
        places = self._of(repository, origin)
        try:
            gone = [self._asked(source.load, name, "") is None for source, name in places]
        except UnreadableRecord:
            return False
        except StoreUnavailable:
            if not repository.is_cut_off:
                raise
            return False
        return bool(gone) and all(gone)

    def forget_cookie(self, request: Request, response: Response) -> None:
        """Delete the old cookie, if the request has it."""
        if self.cookie.name in request.cookies:
            response.delete_cookie(self.cookie.name, **self.cookie.attributes)
            response.cache_control.no_store = True

    def close(self) -> None:
        for store in self._opened:
            store.close()

    def source(self, label: str, url: str | None = None) -> Source | None:
        """The source with this label, at another ``url`` if given; None if nothing is imported from
        it. Raises ``SettingError``.
        """
        found = next((each for each in self._sources if each.label == label), None)
        if found is None or url is None or self._at_url is None:
            return found
        return self._at_url(url)

    # -- the steps

    def _by(
        self, repository: Repository, source: Source, name: str, cookie: str, network: bytes
    ) -> TakenOver:
        found = self.find(repository, source, name, cookie)
        mark, made, record = found.mark, None, found.record
        if mark is None:
            if found.old is None:
                return _DEAD
            made, mark, dropped, record = self.create(repository, source, found, found.old)
            _report_dropped(source, made, dropped)
            if mark is None:
                return _DEAD
        loaded = None if mark.ended else made or repository.find(mark.session)
        if loaded is None:
            return _DEAD
        if found.old is not None and not source.is_of_one_visitor(found.old):
            if made is None:
                copied = shared_cookies.copy(
                    repository, source, found.name, found.old, self._knows_users
                )
                return TakenOver(*copied, mark=record)
            first = token_for(repository.live.secret_keys(), source.label, found.name, mark)
            return TakenOver(loaded, first, mark=record)
        if self._watch and found.old is None and self.has_ended(repository, loaded.body):
            delete_session(repository, loaded.record.key, body=loaded.body)
            return _DEAD
        token = None
        by_pointer = found.old is not None and found.old.by_pointer
        if loaded.record.key == mark.session and not by_pointer:
            token = token_for(repository.live.secret_keys(), source.label, found.name, mark)
        since = Since(epoch=0) if found.old is None else source.since(found.old)
        if token is not None and not enter(repository, loaded, since, network):
            with because("refused"):
                delete_session(repository, loaded.record.key, body=loaded.body, leave_roster=False)
            return _DEAD
        return TakenOver(loaded, token)

    def find(self, repository: Repository, source: Source, name: str, cookie: str) -> Finding:
        """Step 1: the old record and the mark, without writing anything."""
        if source.together is not None:
            key = mark_key(source.label, name)
            foreign, record = self._asked(source.together.load_both, name, key)
            old = None if foreign is None else OldRecord(name, foreign, foreign.expires_at)
        else:
            old = self._asked(source.load, name, cookie)
            name = Token(old.name) if old is not None else name
            key = mark_key(source.label, name)
            record = repository.store.load(key)
        return Finding(name, key, old, read_mark(repository, record), record)

    def create(
        self, repository: Repository, source: Source, found: Finding, old: OldRecord
    ) -> Created:
        """Step 2: the created session and its mark, or only another request's mark. Both are None
        for an old session without values.
        """
        contents = source.contents(repository, old)
        if len(contents.values) <= (PERMANENT in contents.values):
            return Created(None, None)
        nonce = new_nonce()
        key, origin = new_key(repository, source.label, found.name, nonce, old.expires_at)
        loaded, dropped = draft_session(repository, key, contents, origin, self._knows_users())
        mark = Mark(key, nonce)
        record = self._mark_record(repository, found.key, mark)
        there: Record | None = None
        if source.together is not None:
            there = source.together.create_both(loaded.record, record)
        else:
            repository.store.create(loaded.record)
            try:
                repository.store.create(record)
            except KeyTaken:
                with suppress(LogoutUnconfirmed), because("refused"):
                    nowhere = replace(loaded.body, origin=None)
                    delete_session(repository, key, body=nowhere, leave_roster=False)
                there = repository.store.load(found.key)
                if there is None:
                    raise StoreUnavailable(
                        "the mark of an import appeared and disappeared"
                    ) from None
        if there is not None:
            if source.together is not None:
                repository.large.discard(names_in(loaded.body.values.values()), 0)
            return Created(None, read_mark(repository, there), record=there)
        repository.events.emit(SessionImported, key, source.label, dropped)
        return Created(loaded, mark, dropped, record)

    def _mark_record(self, repository: Repository, key: str, mark: Mark) -> Record:
        end = repository.settings.marks_end(repository.now())
        return repository.other_records.draft(key, mark.pack(), end)

    def _asked(self, ask: Callable[..., T], *arguments: object) -> T:
        """Call a store of old sessions. Drops its driver's frames, which would show the old id."""
        try:
            if self._circuit is None:
                return ask(*arguments)
            return self._circuit.call(ask, *arguments)  # type: ignore[no-any-return]  # as it does
        except StoreUnavailable as error:
            error.__context__ = None
            raise error.with_traceback(None) from None

    def _of(self, repository: Repository, origin: Origin) -> list[tuple[Source, str]]:
        """The sources that may hold an old record, each with its name. Stores may share a label."""
        name = open_origin(repository.live.secret_keys(), origin)
        if name is None:
            return []
        name = Token(name)
        return [(source, name) for source in self._sources if source.label == origin.label]

    def is_over(self, now: int) -> bool:
        """Whether the import has ended."""
        return self.until is not None and now >= self.until

    def _refuse(self, repository: Repository, source: Source, reason: str, advice: str) -> None:
        """Count an old session that can't be read. It stays where it is, and so does the cookie."""
        repository.events.emit(ImportRefused, source.label, reason)
        kind = source.label, reason.partition(":")[0]
        if kind not in self._reported:
            self._reported.add(kind)
            logger.warning(
                "An old session of %s was not taken over: %s. %s",
                source.label,
                reason,
                advice,
            )


def _report_dropped(source: Source, made: Loaded | None, dropped: tuple[str, ...]) -> None:
    if made is None:
        return
    for name in dropped:
        logger.warning(
            "session[%s] of an old session can't be kept and was left out (session %s, from %s)",
            name,
            made.record.key,
            source.label,
        )


def _network(request: Request) -> bytes:
    return network_of(request.remote_addr)
