"""The session in templates: ``{{ session.size }}`` shows the stored key, as with Flask."""

from __future__ import annotations

from typing import Any

from flask import Flask, current_app
from flask import session as flask_session
from flask.sessions import SecureCookieSession
from werkzeug.local import LocalProxy


class _TemplateSession(LocalProxy[Any]):
    """``flask.session``, in which stored keys hide all attributes but Flask's own.

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
    """Give the templates of ``app`` their view of the session when the first one is rendered.

    Creating the Jinja environment earlier would freeze the application's options for it.
    """
    # After Flask's own processor, which before 3.1.3 gives templates the session itself.
    app.template_context_processors[None].insert(1, _replace_session)


def _replace_session() -> dict[str, Any]:
    known = current_app.jinja_env.globals
    if known.get("session") is flask_session:  # unless the application replaced it
        known["session"] = _template_session
    return {"session": _template_session} if known.get("session") is _template_session else {}
