"""``ext.open_user``: the values of a user, for jobs and commands."""

from __future__ import annotations

from functools import partial
from types import TracebackType

from flask import Flask

from ..errors import TransactionMisused
from ..opening import in_a_thread, save
from ..processes import process
from ..repository.repository import Repository
from ..request.session import UserValues
from ..request.state import IN_VIEW, SAVED
from ..request.user_values import UserLifecycle, user_lifecycle


class OpenUser:
    """The values of a user, from ``ext.open_user(user_id)``: for ``with`` and ``async with``.

    The block gets what a view gets as ``session.shared``. Its changes are stored at its end, merged
    with the changes of the user's requests. If the block raises, they are dropped, except for
    changes that ``update_atomic`` or a transaction stored at once. Each use loads the values again.

    Leaving raises ``SessionEnded`` if the values were deleted before the changes could be stored,
    ``TransactionMisused`` if a transaction or lock is still open, and the errors of a save. One
    round trip at the first use, one more for changes or a renewal that is due.
    """

    def __init__(self, repository: Repository, app: Flask, user_id: str, renew: bool) -> None:
        self._repository = repository
        self._app = app
        self._user_id = user_id
        self._renew = renew
        self._life: UserLifecycle | None = None

    def __enter__(self) -> UserValues:
        if self._life is not None:
            raise TransactionMisused(
                "This block is open already: call ext.open_user() again for each block"
            )
        process.notice()
        life = user_lifecycle(self._repository, self._user_id, self._app, None, IN_VIEW)
        life.renews = self._renew
        self._life = life
        return UserValues(life)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        life, self._life = self._life, None
        assert life is not None  # it was entered
        try:
            if kind is None:
                save(life)
        finally:
            with life.mutex:
                life.phase = SAVED
                life.drop_unreferenced()

    async def __aenter__(self) -> UserValues:
        """Like ``with``, but without blocking the event loop."""
        return await in_a_thread(self.__enter__)

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await in_a_thread(partial(self.__exit__, kind, error, traceback))
