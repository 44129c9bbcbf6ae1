"""The session as templates see it: ``{{ session.size }}`` shows the stored key, as with Flask."""

from __future__ import annotations

from typing import Any

from flask import Flask, current_app
from flask import session as flask_session
from flask.sessions import SecureCookieSession
from werkzeug.local import LocalProxy


class _TemplateSession(LocalProxy[Any]):
    """``flask.session``, of which only Flask's own attributes come before the stored keys.

    Jinja looks for an attribute first, and our sessions have more of them than Flask's.
    """

    __slots__ = ()

    def __getattr__(self, name: str) -> Any:
        session = self._get_current_object()
        if not hasattr(SecureCookieSession, name):
            try:
                return session[name]
            except KeyError:
                pass
        return getattr(session, name)


_template_session = _TemplateSession(lambda: flask_session._get_current_object())  # type: ignore[attr-defined]


def prepare_templates(app: Flask) -> None:
    """Give the templates of ``app`` their view of the session, as soon as one is rendered.

    Not before, since making the Jinja environment would fix the application's options for it.
    """
    # After Flask's own, which before 3.1.3 gives templates the session itself.
    app.template_context_processors[None].insert(1, _replace_session)


def _replace_session() -> dict[str, Any]:
    known = current_app.jinja_env.globals
    if known.get("session") is flask_session:  # or the application has put its own there
        known["session"] = _template_session
    return {"session": _template_session} if known.get("session") is _template_session else {}
