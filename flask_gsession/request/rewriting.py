"""Replaces or removes the value of one key in the store at once: ``update_atomic``, ``take``."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from ..errors import SessionEnded, Stale, UnreadableRecord, ValueLost
from ..values.merge import Change, last, reject
from ..values.references import holds
from .checks import check_reaches_centre
from .ending import refuse
from .lifecycle import Lifecycle
from .own_session import start_own_session
from .saving import commit
from .state import current_block
from .storing import Edit, Written
from .writing import Write, needs_own_session


class NotStored(SessionEnded):
    """The session isn't stored, since this request itself has ended or emptied it."""


def rewrite(
    life: Lifecycle,
    key: str,
    replace: Callable[[bytes | None], bytes | None],
    what: str,
    *,
    settle: Callable[[bytes | None], None],
    recover: Callable[[bytes, ValueLost], None],
) -> None:
    """Store ``replace(raw)`` for the encoded value of ``key`` now; None removes the key.

    ``replace`` runs again after a lost race, and may call the application. This request's other
    changes stay pending. A change of this very key is stored first. ``settle`` gets the stored
    value. ``recover`` is called for a large value that is lost. Raises ``SessionEnded`` if the
    session has ended, ``NotStored`` if this request ended it.
    """
    _Rewrite(life, what, key=key, replace=replace, settle=settle, recover=recover).run()
    if life.seen.record is None:
        raise SessionEnded


class _Rewrite(Write, eq=False, kw_only=True):
    """Replaces the value of one key in the store; see ``rewrite``."""

    key: str
    replace: Callable[[bytes | None], bytes | None]
    settle: Callable[[bytes | None], None]
    recover: Callable[[bytes, ValueLost], None]

    def run(self) -> bool:
        what = "" if self.life.repository.edge is None else self.unmergeable()
        if what:
            check_reaches_centre(self.life, what)
        return super().run()

    def unmergeable(self) -> str:
        life, key = self.life, self.key
        is_take = self.what == "take"
        policy = life.repository.merger.policy_of(key, life.policies)
        if not is_take and policy not in (last, reject):
            return ""  # it can be merged
        return f"{self.what} of session[{ascii(key)[:60]}]"

    def send(self, step: Edit, lost: int) -> Written | None:
        with self.life.mutex:
            if self.life.seen is not step.seen:  # another thread of this request was faster
                raise Stale
            return super().send(step, lost)

    def edit(self) -> Edit | None:
        if self.stale is not None and not self.catch_up():
            return None
        life, key = self.life, self.key
        while True:
            with life.mutex:
                if needs_own_session(life, rotating=True):  # even inside a lock
                    start_own_session(life)
                outside = life.block is not None and current_block.get() is not life.block
                if not outside and life.seen.record is not None and life.values.has_changed(key):
                    commit(life)
                seen, values = life.seen, life.values
                if seen.record is None:
                    raise SessionEnded if life.ended else NotStored
                stored = values.unexpired()
                raw = stored.get(key)
            try:
                changed = self.replace(raw)
            except UnreadableRecord as error:
                refuse(life, error.reason, error.detail)
                raise SessionEnded from None
            except ValueLost as error:
                assert raw is not None  # a value was lost
                self.recover(raw, error)
                continue
            if changed != raw and not holds(raw, changed):
                stored = dict(stored)
                if changed is None:
                    del stored[key]
                else:
                    stored[key] = changed
                change = {key: Change(raw, changed)}
                return Edit(seen, stored, change, settle=partial(self.settle, changed))
            with life.mutex:
                if life.seen is seen:
                    if not values.has_changed(key):
                        self.settle(raw)
                    return None
