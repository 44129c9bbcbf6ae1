"""Signs users out when their OpenID provider does: OpenID Connect Back-Channel Logout 1.0."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from flask import Blueprint, current_app, jsonify, request
from flask.blueprints import BlueprintSetupState
from werkzeug.wrappers import Response

from ..errors import SettingError, SignInRefused, StoreError
from ..events import logger
from ..extension import NAME, Session
from ..repository.repository import Repository
from ..request.admission import sign_in_since
from ..request.loading import open_from_store
from ..request.ownership import stored_device_of
from ..request.session import SessionData, lifecycle_of
from ..users.roster import Roster, retag
from ..users.rosters import checked_user_id
from .oidc_records import SignIns, tag_of
from .oidc_tokens import Keys, KeysUnavailable, LogoutToken, TokenReader, TokenRefused

__all__ = ["BackChannelLogout"]

_RETRY_AFTER = 5  # seconds
_REASON = "back-channel logout"


class BackChannelLogout:
    """Ends the sessions that an OpenID provider logs out.

    ``issuer`` and ``client_id``: as registered with the provider. ``keys``: the provider's
    ``jwks_uri``, its JWK set, or a function that returns it. Keys from a URL or a function are
    cached for an hour, and fetched again for an unknown key. ``algorithms``: the allowed signature
    algorithms, RS256 by default; only asymmetric ones are possible. ``ext``: by default the
    application's first ``Session``.

    Raises ``SettingError`` for other arguments. Source: OpenID Connect Back-Channel Logout 1.0.
    """

    def __init__(
        self,
        issuer: str,
        client_id: str,
        keys: Keys,
        *,
        algorithms: Collection[str] = ("RS256",),
        ext: Session | None = None,
    ) -> None:
        self._reader = TokenReader(issuer, client_id, keys, algorithms)
        self._issuer = issuer
        self._ext = ext

    def bind(
        self,
        claims: Mapping[str, Any],
        user_id: str | int | None = None,
        label: str | None = None,
        tags: Collection[str] = (),
    ) -> None:
        """Bind the session to the user that the provider has just signed in.

        Call it instead of ``session.bind``, or after Flask-Login's ``login_user``. ``claims``: the
        claims of the verified ID token; uses ``iss``, ``sub`` and, if present, ``sid``.
        ``user_id``: by default the ``sub``. ``label`` and ``tags`` (up to 9) as in
        ``session.bind``.

        Raises ``SignInRefused`` (401) if the provider has logged the user out since, ``ValueError``
        for claims of another issuer, and the errors of ``session.bind``. Takes five round trips
        more than ``session.bind``; seven if the session is bound to that user already.
        """
        if claims.get("iss") != self._issuer:
            raise ValueError("the claims come from another issuer than this BackChannelLogout's")
        sub, sid = claims.get("sub"), claims.get("sid")
        if not isinstance(sub, str) or not sub or not (sid is None or isinstance(sid, str)):
            raise ValueError("the claims need a sub; a sid is text")
        user = checked_user_id(sub if user_id is None else user_id)
        ext, repository = self._session()
        session: Any = ext.session
        opened = session._get_current_object()
        if not isinstance(opened, SessionData):
            raise SettingError("BackChannelLogout needs a SECRET_KEY")
        life, rosters = lifecycle_of(opened), repository.rosters
        open_from_store(life, "a sign-in")
        tag = tag_of(self._issuer, "sid", sid) if sid else tag_of(self._issuer, "sub", sub)
        all_tags = (*tags, tag)
        # The order matters: see the module of the records.
        epoch = rosters.look(user).roster.epoch
        records, began = SignIns(repository, self._issuer), int(life.began.time * 1000)
        if sid:
            records.note("sid", sid, user, began)
        records.note("sub", sub, user, began)
        device_id = stored_device_of(life, user)
        if device_id is not None:
            # The device stays the same, but belongs to another session of the provider from now on.

            def step(roster: Roster) -> tuple[Roster, None]:
                if roster.epoch != epoch:
                    raise SignInRefused
                return retag(roster, device_id, "oidc:", tag), None

            rosters.change(user, step)
        with sign_in_since(rosters, user, epoch):
            opened.bind(user, label, all_tags)

    def blueprint(
        self, url: str = "/oidc/backchannel-logout", name: str = "gsession_oidc"
    ) -> Blueprint:
        """A blueprint with the page that the provider calls, its ``backchannel_logout_uri``.

        Responds 200 when the sessions have ended, 400 to invalid and repeated tokens, and 503 with
        ``Retry-After`` if the store or the provider's keys are unavailable: then nothing is stored,
        and the same token works later. A token with a ``sid`` ends the sessions that this session
        of the provider signed in; one with only a ``sub`` ends all sessions of the user. Eight
        round trips, and the deletes; none for a forged token. The page is exempt from Flask-WTF's
        CSRF check.
        """
        blueprint = Blueprint(name, __name__)

        @blueprint.post(url)
        def log_out() -> Response:
            tokens = request.form.getlist("logout_token")
            if request.mimetype != "application/x-www-form-urlencoded" or len(tokens) != 1:
                return _invalid("the body must be a form with one logout_token")
            repository = self._session()[1]
            try:
                token = self._reader.read(tokens[0], repository.now() / 1000)
                records = SignIns(repository, self._issuer)
                if records.is_used(token.jti):
                    return _invalid("the token was used before")
                ended = self._end(records, token)
                # Last, so that a provider can send it again after an outage.
                records.note_used(token.jti, token.expires_at * 1000)
            except TokenRefused as error:
                return _invalid(str(error))
            except (StoreError, KeysUnavailable) as error:
                logger.error("A back-channel logout could not be finished: %s", error)
                retry_after = getattr(error, "retry_after", _RETRY_AFTER)
                return _answer(503, {"Retry-After": str(retry_after)}, error="try_again")
            logger.info("The provider %s logged a user out: %d sessions", self._issuer, ended)
            return _answer(200)

        @blueprint.record_once
        def let_through(state: BlueprintSetupState) -> None:
            """Exempt the page from Flask-WTF, since the provider authenticates by its signature."""
            extensions: dict[str, Any] = state.app.extensions

            def exempt() -> None:
                if "csrf" in extensions:
                    extensions["csrf"].exempt(blueprint)

            exempt()
            if "csrf" not in extensions:
                # CSRFProtect may come later. Then this function runs before its check, since it
                # came first.
                state.app.before_request(exempt)

        return blueprint

    def _end(self, records: SignIns, token: LogoutToken) -> int:
        users, by = self._session()[0].users, self._issuer
        if token.sid is None:
            assert token.sub is not None
            named = records.log_out("sub", token.sub)
            return sum(users.revoke_all(user, reason=_REASON, by=by) for user in named)
        tags = [tag_of(self._issuer, "sid", token.sid)]
        ids = dict.fromkeys(records.log_out("sid", token.sid))
        if token.sub is not None and not ids:
            # The ID token had no sid, so its sessions have the tag of the subject.
            tags.append(tag_of(self._issuer, "sub", token.sub))
            ids = dict.fromkeys(records.users("sub", token.sub))
        return sum(users.revoke_all(user, tags=tags, reason=_REASON, by=by) for user in ids)

    def _session(self) -> tuple[Session, Repository]:
        interfaces = current_app.extensions.get(NAME, {})
        if not interfaces:
            raise SettingError("BackChannelLogout needs a Session: call Session(app)")
        ext = next(iter(interfaces)) if self._ext is None else self._ext
        return ext, interfaces[ext].repository


def _invalid(description: str) -> Response:
    logger.info("A back-channel logout was refused: %s", description)
    return _answer(400, error="invalid_request", error_description=description)


def _answer(status: int, headers: Mapping[str, str] | None = None, **body: str) -> Response:
    response = jsonify(body) if body else Response(status=status)
    response.status_code = status
    response.headers.update(headers or {})
    response.headers["Cache-Control"] = "no-store"
    return response
