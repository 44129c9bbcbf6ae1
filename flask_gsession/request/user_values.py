"""A user's values in one request: like its session, but in another record."""

from __future__ import annotations

from flask import Flask, Request

from ..errors import KeyTaken, StoreUnavailable, UnreadableRecord, UserValuesUnreadable
from ..events import WriteDropped, logger
from ..repository.repository import Repository
from ..repository.user_values import UserValuesRecord
from ..users.joins import lasting
from ..values.payload import Body
from .following import catch_up, settle_attempts
from .lifecycle import NO_ATTEMPTS, Lifecycle
from .loading import load
from .rebasing import restart
from .state import NO_WISHES, Outage, Presented, Seen, remaining

_CREATES = 3  # attempts to store an empty record


class UserLifecycle(Lifecycle, eq=False, kw_only=True):
    """The lifecycle of a user's values in one request, loaded at the first look.

    ``user_id`` None: nobody is signed in, so there are no values and no record.
    """

    user_values: UserValuesRecord
    user_id: str | None

    @property
    def is_of_user(self) -> bool:
        return True

    def check_readable(self) -> None:
        """Raises ``UserValuesUnreadable`` if only other workers can read the stored values."""
        if self.seen.for_others and self.seen.record is None:
            raise UserValuesUnreadable(
                f"the values {self.user_values.key} of a user need another encryption key, or a "
                "newer version. Restore the key, or delete them with ext.users.forget"
            )

    def ensure_stored(self) -> None:
        """Make sure that there is a record, for changes that are stored at once.

        One round trip if there is none.
        """
        load(self)
        self.check_readable()
        with self.mutex:
            for _ in range(_CREATES):
                if self.seen.record is not None or self.ended or self.attempts:
                    return
                body = Body({})
                _, record = self.repository.records.draft_new(body)
                try:
                    self.repository.create(record)
                except KeyTaken:
                    catch_up(self)
                else:
                    self.seen = Seen(None, record, body)

    def find_new(self, *, discard: bool) -> bool:
        try:
            loaded = self.repository.find(self.user_values.key)
            if loaded is None:
                return True
        except UnreadableRecord as error:
            if error.for_others:
                self.seen = Seen(for_others=True)
                self.check_readable()
            self.user_values.remove_damaged()
            return True
        except StoreUnavailable as error:
            self.note_outage(error, "loaded again")
            raise
        record, body = loaded.record, loaded.body
        before = record._replace(version=0)  # any version but that of the record
        own = settle_attempts(self, record, before, repeats=not discard)
        if own is not None:
            self.values.rebase(own.body.values, saved=own.changes)
            self.wishes = remaining(own.wishes, self.wishes)
        now = self.repository.now if body.marked else None
        if discard:
            restart(self.values, body.values, now)
            self.wishes = NO_WISHES
        else:
            self.values.rebase(body.values, now)
        if self.written_large is not None:
            self.written_large.mark_referenced(body.values)
        self.seen = Seen(None, record, body)
        self.attempts = NO_ATTEMPTS  # last, since an exception may interrupt before
        return True

    def body(self, stored: dict[str, bytes], *, has_large: bool) -> Body:
        body = super().body(stored, has_large=has_large)
        if body.joins:
            body.joins = lasting(body.joins, self.repository.now())
        return body

    def must_stay(self) -> bool:
        """Whether the record is needed without any values, since a sign-in may be repeated."""
        body = self.seen.body
        return body is not None and bool(lasting(body.joins, self.repository.now()))

    def end(self, during: str) -> None:
        """Drop this request's changes, since the record was deleted while the request ran."""
        with self.mutex:
            handle = self.handle
            logger.info(
                "User values %s were deleted while a request ran; its changes were dropped",
                handle,
            )
            self.forget()
            self.ended = True
            self.repository.events.emit(WriteDropped, handle, f"deleted before {during}")


def user_lifecycle(
    repository: Repository, user_id: str | None, app: Flask, request: Request | None, phase: str
) -> UserLifecycle:
    """The values of a user, for a request or a block. No round trip."""
    values = UserValuesRecord(repository, user_id or "")
    presented = Presented(handle=values.key)
    life = UserLifecycle(
        repository=values.repository,
        user_values=values,
        present=lambda *_: presented,
        app=app,
        request=request,
        _began=(0.0, 0),
        phase=phase,
        user_id=user_id,
    )
    if user_id is None:
        life.forget()
        life.opened = True
    return life


def values_of(life: Lifecycle, user_id: str | None) -> UserLifecycle:
    """The values of a user in the request of this session. No round trip."""
    with life.mutex:
        found = life.of_users.get(user_id)
        if found is None:
            found = user_lifecycle(life.repository, user_id, life.app, life.request, life.phase)
            found.error_page = life.error_page
            found.renews = life.renews
            life.of_users = {**life.of_users, user_id: found}
        return found


def adopt_trouble(life: Lifecycle, other: Lifecycle) -> None:
    """Let the response report an outage that only the user's values met."""
    outage = other.outage
    if life.outage is None and outage is not None and outage.unseen:
        life.outage = Outage(outage.error, loading=True, unseen=True)
