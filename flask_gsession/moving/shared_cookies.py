"""Flask cookies that several visitors share, and the sessions made from them.

A Flask cookie has no id, so visitors for whom Flask signed the same values within one second have
the same cookie. The first request with it creates the session that the mark names. Each later
request gets a copy: its own session with the cookie's values.

A browser that sends several first requests at once keeps the cookie that arrives last. So a request
that is about to set our cookie stores the next version of the mark, with the time:

- A request that changed the session always does so, before its change is stored. - A request that
only read does so unless another request did since ten seconds before it began. Otherwise it sets no
cookie. Within ten seconds, the browser gets a response, and then sends our cookie.

A logout notes in the mark that the old cookie is invalid. So no parallel request can set a cookie
afterwards, unless its response was already on its way. ``tests/simulation/cookie_model.py`` is a
model. If the clocks of two workers differ, a read waits longer, or doesn't wait for responses that
are on their way.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from msgspec.structs import replace

from ..errors import SessionConflict, Stale, StoreUnavailable, UnreadableRecord
from ..events import SessionImported
from ..repository.races import tries, write
from ..repository.repository import Loaded, Repository
from ..stores.base import Record
from ..tokens import Token
from ..values.payload import Origin
from .drafting import draft_session, new_key
from .mark import Mark, new_nonce, token_of
from .source import OldRecord, Source

#: How long a response can be on its way, in milliseconds.
_ON_ITS_WAY = 10_000


def copy(
    repository: Repository,
    source: Source,
    name: str,
    old: OldRecord,
    knows_users: Callable[[], bool],
) -> tuple[Loaded, Token]:
    """Create a copy, and return it with its token. One round trip."""
    contents, nonce = source.contents(repository, old), new_nonce()
    key, origin = new_key(repository, source.label, name, nonce, None)
    loaded, dropped = draft_session(repository, key, contents, origin, knows_users())
    repository.store.create(loaded.record)
    repository.events.emit(SessionImported, key, source.label, dropped)
    secret = repository.live.secret_keys()[0]
    return loaded, token_of(secret, source.label, name, nonce)


def may_set_cookie(repository: Repository, record: Record, began: int, *, wrote: bool) -> bool:
    """Whether a request may set our cookie.

    ``record``: the mark that the request found. ``began``: when the request began, in milliseconds.
    One round trip. A request that wrote takes two more for each lost race.
    """
    try:
        if wrote:
            return _store_next(repository, record.key, record)
        if began < Mark.of(repository.other_records.read(record)).answered + _ON_ITS_WAY:
            return False
        repository.store.save(_next(repository, record, ended=False), record.version)
    except Stale:
        return False
    except (StoreUnavailable, UnreadableRecord, SessionConflict):
        # Without our cookie, a change would be lost. After a mere read, the next request gets the
        # old cookie's values again.
        return wrote
    return True


def end(repository: Repository, origin: Origin) -> None:
    """Note that the old cookie is invalid. Raises ``StoreUnavailable``. Two round trips."""
    _store_next(repository, origin.mark, None, ended=True)


def _store_next(
    repository: Repository, key: str, known: Record | None, *, ended: bool = False
) -> bool:
    """Store the next version of the mark. Returns False if the old cookie is invalid."""
    there = [] if known is None else [known]
    is_dead = False

    def prepare() -> tuple[Record, Record] | None:
        nonlocal is_dead
        record = there.pop() if there else repository.store.load(key)
        if record is None:
            return None  # the imports have ended
        is_dead = Mark.of(repository.other_records.read(record)).ended
        return None if is_dead else (record, _next(repository, record, ended=ended))

    def send(step: tuple[Record, Record], _: int) -> None:
        record, after = step
        repository.store.save(after, record.version)

    write(prepare, send, partial(tries, repository.settings.store_timeout))
    return not is_dead


def _next(repository: Repository, record: Record, *, ended: bool) -> Record:
    mark = Mark.of(repository.other_records.read(record))
    content = replace(mark, ended=ended, answered=repository.now()).pack()
    return repository.other_records.draft_renewable(
        record.key, content, record.absolute_expires_at, record
    )
