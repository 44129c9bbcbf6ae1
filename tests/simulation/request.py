"""One simulated request: the same operations on the real session and on the model's view of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from flask import Response
from werkzeug.exceptions import HTTPException
from werkzeug.http import parse_date

from flask_gsession.errors import SessionConflict, SessionEnded, StoreUnavailable
from flask_gsession.request.session import SessionData, lifecycle_of
from flask_gsession.tokens import session_key

from .audit import FAILED, OK, UNKNOWN, Done, Segment, Visit
from .model import MISSING, Conflict, Fleeting, Mirror, View, Violation, copied, shown, unexpired
from .plan import GRACE, ON_MAPPINGS, PERMANENT, Held, Op, RequestPlan
from .scheduler import Interrupted, VirtualClock
from .site import Site, running


class Serving:
    """One request through `open_session`, a view and `save_session`."""

    def __init__(
        self,
        site: Site,
        clock: VirtualClock,
        plan: RequestPlan,
        visit: Visit,
        cookie: str | None,
    ) -> None:
        self.site, self.clock, self.plan, self.visit = site, clock, plan, visit
        self.model = site.store.model
        visit.token = cookie.rpartition(".")[0] if cookie else None
        key = session_key(visit.token) if visit.token else None
        mirror = Mirror(plan.name, plan.browser, key, lambda: clock.now)
        if key is None:
            mirror.state = "none"
        self.mirror = mirror
        request = running()
        request.mirror, request.visit = mirror, visit
        self.session: SessionData = site.open(cookie)
        self.segment = Segment()
        # The view's variables: values from the real session, and from the model.
        self.held: Held = {}
        self.held_by_model: Held = {}
        self.model.trace(f"{plan.name:4} starts with {self.model.name(key)}")

    def serve(self) -> Response:
        """Run the view and save; the response."""
        app, mirror = self.site.app, self.mirror
        response = app.response_class()
        response.status_code = self._view()
        lifecycle_of(self.session).begin_response(response)  # as Flask, before it saves
        epoch = mirror.epoch
        self.site.interface.save_session(app, self.session, response)
        status = response.status_code
        self.model.trace(f"{self.plan.name:4} answers {status}")
        self._check_status(status)
        self._check_cookie(response)
        if not mirror.unsaved:
            self.model.check_end(mirror, status)
        if mirror.epoch != epoch and mirror.is_apart:
            self.visit.discard_pending()  # it is stored in another session
        served = status == 200 and not (mirror.faulted or mirror.dropped)
        if served and mirror.line is not None and self.model.head_of(mirror.key) is not None:
            mirror.line.used = max(mirror.line.used, mirror.loaded)
        return response

    def leave(self) -> None:
        """The request is over with its session, well or not."""
        if self.segment.line is None and self.mirror.lines and not self.mirror.is_apart:
            self.segment.line = self.mirror.lines[-1]

    def _view(self) -> int:
        for op in self.plan.ops:
            failed = self._do(op)
            if failed is not None and not self.plan.tolerant:
                return failed
        return 200

    def _do(self, op: Op) -> int | None:
        """Do one operation and note its outcome. Returns the status if it failed."""
        mirror, visit = self.mirror, self.visit
        epoch = mirror.epoch
        done = Done(op, self.segment, began_at=self.clock.now)
        visit.done.append(done)
        failed: int | None = None
        try:
            done.result = self._operate(op)
            done.outcome = "pending"
        except HTTPException as error:
            self._check_refusal(error)
            unsure = isinstance(error, StoreUnavailable) and op.kind in ("atomic", "take")
            done.outcome = UNKNOWN if unsure else FAILED
            failed = error.code
        except Interrupted:
            done.outcome = UNKNOWN if op.kind in ("atomic", "take", "transact") else FAILED
            failed = 500
        if self.model.tracing:
            self.model.trace(f"{self.plan.name:4} {op}: {failed or shown(done.result)}")
        if mirror.epoch != epoch:
            self.held.clear()
            self.held_by_model.clear()
            self.leave()
            self.segment = Segment()
            if mirror.is_apart:
                visit.discard_pending()
        done.segment, done.at, done.ended_at = self.segment, visit.tick(), self.clock.now
        done.on_live = mirror.state == "live"
        if op.kind == "rotate":  # and not one that it made itself
            presented = self.model.line_of.get(mirror.presented or "")
            done.on_live = done.on_live and mirror.line is presented
        if mirror.line is not None:
            self.segment.line = mirror.line
        if failed is None:
            if op.kind == "destroy" or (op.kind in ("atomic", "take") and done.on_live):
                done.outcome = OK
            if op.kind in ("destroy", "reload"):
                visit.discard_pending()
            if op.kind == "transact" and done.on_live:
                visit.confirm_pending()
            if visit.found is None and op.kind not in ("destroy", "think"):
                visit.found = not self.session.new
        return failed

    # -- operations

    def _operate(self, op: Op) -> Any:
        on_mapping = ON_MAPPINGS.get(op.kind)
        if on_mapping is None:
            operate: Callable[[Op], Any] = getattr(self, f"_{op.kind}")
            return operate(op)
        result = on_mapping(self.session, self.held, op)
        expected = on_mapping(self.mirror.view, self.held_by_model, op)
        if result != expected:
            raise Violation(f"{op} gave {shown(result)}, not {shown(expected)}")
        if op.kind == "permanent":
            self.mirror.timeouts.add(PERMANENT * 1000)
        return copied(result)

    def _atomic(self, op: Op) -> Any:
        mirror, key = self.mirror, op.argument
        function, default = _ATOMIC[key](op.tag)
        mirror.begin_atomic(key, function, default)
        try:
            result = self.session.update_atomic(key, function, default)
            expected = mirror.atomic_result
            mirror.part()
            if expected is MISSING:
                if mirror.state != "none":
                    raise Violation(f"{op} stored nothing")
                expected = function(copied(mirror.view.get(key, default)))
                mirror.view.change(key, expected)
        finally:
            mirror.atomic = None
        if result != expected:
            raise Violation(f"{op} gave {shown(result)}, not {shown(expected)}")
        # Values that the view got under this key before are no longer part of the session.
        self.held.pop(key, None)
        self.held_by_model.pop(key, None)
        return copied(result)

    def _fleeting(self, op: Op) -> None:
        """Set a value that expires by itself."""
        key, seconds = op.argument
        kept = Fleeting(op.tag, self.clock.now + seconds * 1000)
        self.session.set(key, op.tag, ttl=seconds)
        self.mirror.view[key] = kept

    def _ttl(self, op: Op) -> float | None:
        """Ask for how long a value is kept."""
        expected: float | None
        try:
            found = self.session.ttl(op.argument)
        except KeyError:
            found = -1
        try:
            end = self.mirror.view.ends(op.argument)
            expected = None if end is None else (end - self.clock.now) / 1000
        except KeyError:
            expected = -1
        if found != expected:
            raise Violation(f"{op} gave {found}, not {expected}")
        return found

    def _take(self, op: Op) -> Any:
        """Take a value out, which nobody else gets."""
        mirror, key = self.mirror, op.argument
        mirror.begin_atomic(key, None, None)
        try:
            result = self.session.take(key, None)
            expected = mirror.atomic_result
            mirror.part()
            if expected is MISSING:
                expected = None
                if mirror.state == "none":
                    expected = mirror.view.pop(key, None)
                else:
                    if key in unexpired(mirror.view.known, self.clock.now):
                        raise Violation(f"{op} stored nothing")
                    mirror.view.live.pop(key, None)
                    mirror.view.base[key] = MISSING
        finally:
            mirror.atomic = None
        if result != expected:
            raise Violation(f"{op} gave {shown(result)}, not {shown(expected)}")
        return result

    def _clear(self, op: Op) -> None:
        self.session.clear()
        for key in list(self.mirror.view):
            del self.mirror.view[key]
        self.mirror.cleared = True
        self.held.clear()
        self.held_by_model.clear()

    def _rotate(self, op: Op) -> None:
        self.session.rotate(op.argument)
        mirror = self.mirror
        grace = GRACE if op.argument is None else op.argument
        if mirror.state == "live" and not mirror.has_token and grace > 0:
            return  # an old token never leads to a new one
        if mirror.state == "live" or (mirror.state == "none" and mirror.attempts):
            mirror.rotation = grace if mirror.rotation is None else min(mirror.rotation, grace)
        mirror.part()

    def _destroy(self, op: Op) -> None:
        mirror = self.mirror
        mirror.destroying, key = True, mirror.key
        # One that is created after it was deleted is a session that nobody has.
        attempted = [
            attempt.key
            for attempt in mirror.attempts.values()
            if not (attempt.late and attempt.state == "none")
        ]
        try:
            self.session.destroy()
        finally:
            mirror.destroying = False
        own_only = mirror.is_apart and key is not None
        for dead in (key, *attempted, None if own_only else mirror.presented):
            if self.model.head_of(dead) is not None:
                raise Violation("destroyed its session, and it is alive")
        mirror.without = "none"
        mirror.become("none")
        mirror.epoch += 1
        mirror.ended_itself = True

    def _reload(self, op: Op) -> None:
        mirror = self.mirror
        if mirror.state == "live":
            mirror.reloading = True
            try:
                self.session.reload()
            finally:
                mirror.reloading = False
            mirror.rotation, mirror.timeouts = None, set()
            self._start_afresh()
            mirror.emptied = False
        elif mirror.ended_itself and mirror.presented:
            self.session.reload()
            mirror.view = View(mirror.now)
        else:
            mirror.become("unopened" if mirror.presented else "none")
            self.session.reload()
        mirror.epoch += 1

    def _start_afresh(self) -> None:
        """Read the stored session, without earlier reads or changes."""
        mirror = self.mirror
        if mirror.line is not None:
            mirror.view = View(mirror.now)
            mirror.view.known = mirror.line.values
            mirror.cleared = False

    def _transact(self, op: Op) -> None:
        """Store pending changes now, and start from the stored session."""
        mirror, opened = self.mirror, self.mirror.state != "unopened"
        with self.session.transaction():
            mirror.part()
            # Values that the view got before are no longer part of the session.
            self.held.clear()
            self.held_by_model.clear()
            if opened:
                mirror.discard_attempts()
                self._start_afresh()

    def _lifetime(self, op: Op) -> None:
        self.session.set_lifetime(op.argument)
        self.mirror.timeouts.add(op.argument * 1000)

    def _force(self, op: Op) -> None:
        self.session.modified = True

    def _think(self, op: Op) -> None:
        running().pause("think")

    # -- the answers that a request may get

    def _check_refusal(self, error: HTTPException) -> None:
        """Whether a request may fail in this way now."""
        mirror = self.mirror
        if isinstance(error, StoreUnavailable):
            right = mirror.faulted
        elif isinstance(error, SessionEnded):
            right = mirror.state == "ended"
        elif isinstance(error, SessionConflict):
            right = mirror.unsure or self._in_conflict()
        else:
            right = False
        if not right:
            raise Violation(f"was refused without a reason: {error!r}")

    def _in_conflict(self) -> bool:
        view = self.mirror.view
        try:
            self.model.merge(view.known, view.changes(), self.clock.now)
        except Conflict:
            return True
        return False

    def _check_status(self, status: int) -> None:
        """Whether the response may have this status."""
        mirror = self.mirror
        refused = any(done.outcome != "pending" for done in self.visit.done)
        right = (
            status == 200
            or (status == 503 and mirror.faulted)
            or (status == 500 and running().struck)
            or (status == 409 and mirror.unsure)
            or (status == 409 and (refused or self._in_conflict()))
        )
        if not right:
            raise Violation(f"was answered {status} without a reason")

    def _check_cookie(self, response: Response) -> None:
        """Whether the response sets the cookie that it should, and no other."""
        mirror = self.mirror
        sent = sent_cookie(response)
        if sent is None:
            if mirror.cookie_due:
                raise Violation("didn't get its new token")
            return
        cookie = sent[0]
        if cookie is None:
            if not (mirror.ended_itself or (mirror.cleared and mirror.state != "live")):
                raise Violation("was made to forget its token")
            return
        key = session_key(cookie.rpartition(".")[0])
        if mirror.state != "live" or key != mirror.key:
            raise Violation("was given a token that is not of its session")
        if key != mirror.presented and key not in mirror.made:
            raise Violation("was given the token of another request")


#: By key: the function of an update_atomic for a tag, and its default.
_ATOMIC: dict[str, Callable[[str], tuple[Callable[[Any], Any], Any]]] = {
    "atoms": lambda tag: (lambda count: count + 1, 0),
    "hits": lambda tag: (lambda count: count + 1, 0),
    "log": lambda tag: (lambda log: [*log, tag], []),
    "a": lambda tag: (lambda before: tag, None),
}


def sent_cookie(response: Response) -> tuple[str | None, int | None] | None:
    """The cookie that a response sets (None: deletes), and when it expires (milliseconds)."""
    header = response.headers.get("Set-Cookie")
    if header is None:
        return None
    pair, *attributes = header.split("; ")
    if "Max-Age=0" in attributes:
        return None, None
    expires = None
    for attribute in attributes:
        if attribute.startswith("Expires="):
            date = parse_date(attribute[8:])
            assert date is not None
            expires = int(date.timestamp() * 1000)
    return pair.partition("=")[2], expires
