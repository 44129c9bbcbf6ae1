"""The audit log: sign-ins, refusals, sign-outs and revocations, with the user and the actor.

Its records have stable fields for log formatters. They hold no tokens and no values.
"""

from __future__ import annotations

import json
import logging
from typing import Any

from flask import has_request_context, request

from ..events import (
    SIGN_INS,
    DeviceLimitReached,
    DeviceRevoked,
    Events,
    SessionBound,
    SessionUnbound,
    SignInRejected,
    UserConfirmed,
)

logger = logging.getLogger("flask_gsession.audit")


def write_audit_log(events: Events) -> None:
    """Write a record for each event that concerns a user's sign-in."""
    events.subscribe(SessionBound, _bound)
    events.subscribe(SignInRejected, _refused)
    events.subscribe(DeviceLimitReached, _limited)
    events.subscribe(UserConfirmed, _confirmed)
    events.subscribe(DeviceRevoked, _revoked)
    events.subscribe(SessionUnbound, _unbound)


def _bound(event: SessionBound) -> None:
    _write(
        "signed_in" if event.how in SIGN_INS else "bound",
        user_id=event.user_id,
        device_id=event.device_id,
        handle=event.handle,
        method=event.how,
    )


def _refused(event: SignInRejected) -> None:
    _write("sign_in_refused", logging.WARNING, user_id=event.user_id, reason=event.reason)


def _limited(event: DeviceLimitReached) -> None:
    _write("limit_reached", user_id=event.user_id, limit=event.limit, ended=event.ended)


def _confirmed(event: UserConfirmed) -> None:
    _write(
        "confirmed",
        user_id=event.user_id,
        device_id=event.device_id,
        handle=event.handle,
        method=event.method,
    )


def _revoked(event: DeviceRevoked) -> None:
    _write(
        "revoked",
        user_id=event.user_id,
        device_id=event.device_id,
        handle=event.handle,
        reason=event.reason,
        by=event.by,
    )


def _unbound(event: SessionUnbound) -> None:
    _write("signed_out", user_id=event.user_id, device_id=event.device_id)


def _write(action: str, level: int = logging.INFO, **fields: Any) -> None:
    if not logger.isEnabledFor(level):
        return
    fields["client"] = request.remote_addr if has_request_context() else None
    for name, value in fields.items():
        if not isinstance(value, str | int | None):  # such as a lazy translation
            fields[name] = str(value)
    # As JSON, so that text from a user can't look like another field or line.
    shown = " ".join(f"{name}={json.dumps(value)}" for name, value in fields.items())
    logger.log(level, "%s %s", action, shown, extra={"action": action, **fields})
