"""Binds a request's session to a user and unbinds it."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from msgspec.structs import replace

from ..errors import RotationRefused
from ..users.roster import Since
from ..users.rosters import LOGIN, checked_user_id, new_device_id
from ..values.codec import is_valid_text
from ..values.payload import Owner
from .admission import check_roster
from .late_changes import report_late
from .lifecycle import Lifecycle
from .loading import load, open_from_store
from .own_session import rotate_soon
from .state import Binding

_LONGEST_LABEL = 100  # characters
_MOST_TAGS = 10


def bind(
    life: Lifecycle,
    user_id: object,
    label: object = None,
    tags: object = None,
    *,
    remembered: bool = False,
    signed_in: Collection[str] = (),
    fresh: bool = True,
) -> bool:
    """See ``SessionData.bind``. Returns whether the same user signed in once more."""
    user_id = checked_user_id(user_id)
    label, tags = _checked_label(label), _checked_tags(tags)
    open_from_store(life, "a sign-in")
    if life.presented().handle is not None:
        raise RotationRefused(
            "A session from ext.open() can't be bound: nobody can sign in to it, since no response "
            "would carry the new token. Do that in a view."
        )
    if life.is_late:
        report_late(life, "The user of the session")
        return False
    with life.mutex:
        wished, stored = life.wishes.binding, owner_of(life)
        if not life.seen.is_old_token:
            if wished is not None and wished.user_id == user_id:  # earlier in this request
                if label or tags:
                    life.wish(binding=replace(wished, label=label, tags=tags))
                return False
            if stored is not None and stored.user_id == user_id:
                # A sign-in of the same user, perhaps after an unbind: it stays the same device.
                if wished is not None:
                    wished = Binding(user_id, stored.device_id, Since(), fresh=fresh)
                noted = life.wishes.sign_in  # earlier in this request
                rotate_soon(life, 0, signed_in)
                life.wish(binding=wished, sign_in=fresh or noted)
                return fresh and not noted
        found = check_roster(life, user_id)
        since = Since(epoch=found.roster.epoch)
        binding = Binding(user_id, new_device_id(), since, label, tags, remembered, found, fresh)
        rotate_soon(life, 0, signed_in)
        life.wish(binding=binding)
    return False


def unbind(life: Lifecycle) -> None:
    """See ``SessionData.unbind``."""
    load(life)
    if life.is_late:
        report_late(life, "The user of the session")
        return
    with life.mutex:
        stored = owner_of(life)
        if stored is None:
            life.wishes = replace(life.wishes, binding=None)
        else:
            life.wish(binding=NOBODY)


NOBODY = Binding("", "", Since())


def user_id_of(life: Lifecycle) -> str | None:
    """The user that the session is bound to, or will be after the next save."""
    binding = life.wishes.binding  # once, since another thread may store it
    if binding is not None:
        return binding.user_id or None
    if _login_changed(life):
        try:
            return known_user(life.values[LOGIN])
        except KeyError:
            return None
    owner = owner_of(life)
    return None if owner is None else owner.user_id


def device_id_of(life: Lifecycle) -> str | None:
    """The id of the session's device in that user's roster. None if the save will choose it."""
    binding = life.wishes.binding
    if binding is not None:
        return binding.device_id or None
    owner = owner_of(life)
    if owner is None or (_login_changed(life) and user_id_of(life) != owner.user_id):
        return None
    return owner.device_id


def stored_device_of(life: Lifecycle, user_id: str) -> str | None:
    """The id of the device, if the session is stored as this user's. Ignores pending changes."""
    owner = owner_of(life)
    return owner.device_id if owner is not None and owner.user_id == user_id else None


def _login_changed(life: Lifecycle) -> bool:
    """Whether this request set or removed Flask-Login's key without a call of Flask-Login."""
    return (
        life.opened
        and not life.is_late
        and life.values.has_changed(LOGIN)
        and hasattr(life.app, "login_manager")
    )


def signed_in_at(life: Lifecycle) -> int | None:
    """When that user signed in, in milliseconds; None after a remember-me sign-in."""
    binding = life.wishes.binding
    if binding is not None:
        return life.repository.now() if binding.fresh else None
    if life.wishes.sign_in:
        return life.repository.now()
    owner = owner_of(life)
    return owner.signed_in * 1000 if owner is not None and owner.signed_in else None


def seen_at(life: Lifecycle) -> int | None:
    """When the roster last noted a use of the session, in milliseconds; None if it isn't bound."""
    owner = owner_of(life)
    return None if owner is None else owner.seen * 1000


def owner_of(life: Lifecycle) -> Owner | None:
    body = life.seen.body
    return None if body is None else body.owner


def known_user(user_id: object) -> str | None:
    try:
        return checked_user_id(user_id)
    except ValueError:
        return None


def _checked_label(label: object) -> str:
    if label is None:
        return ""
    if not isinstance(label, str) or len(label) > _LONGEST_LABEL or not is_valid_text(label):
        raise ValueError(f"label must be text of at most {_LONGEST_LABEL} characters")
    return str(label)


def _checked_tags(tags: Any) -> tuple[str, ...]:
    if tags is None:
        return ()
    allowed = f"tags must be at most {_MOST_TAGS} strings of at most {_LONGEST_LABEL} characters"
    if not isinstance(tags, (list, tuple, set, frozenset)) or len(tags) > _MOST_TAGS:
        raise ValueError(allowed)
    for tag in tags:
        if not isinstance(tag, str) or len(tag) > _LONGEST_LABEL or not is_valid_text(tag):
            raise ValueError(allowed)
    return tuple(map(str, sorted(tags) if isinstance(tags, (set, frozenset)) else tags))
