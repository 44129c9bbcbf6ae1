"""A panel for Flask-DebugToolbar with the debug dump of the session."""

from __future__ import annotations

from typing import Any

from flask import current_app

try:
    from flask_debugtoolbar.panels import DebugPanel
except ImportError as error:
    raise ImportError(
        f"flask_gsession.contrib.debugtoolbar needs the package {error.name}: install the extra, "
        "flask-gsession[debugtoolbar]"
    ) from None

from ..watching.debug import RECENT, as_text, facts_of, traced

_PAGE = """
{% for text in now %}<pre>{{ text }}</pre>{% else %}
<p>No data: SESSION_DEBUG is off, or the application has no Session.</p>
{% endfor %}
{% if recent %}
<h4>Earlier requests to this process</h4>
{% for text in recent %}<pre>{{ text }}</pre>{% endfor %}
{% endif %}
"""


class SessionPanel(DebugPanel):
    """Shows the debug dumps of this request and of earlier ones.

    Add it to ``DEBUG_TB_PANELS``. The toolbar renders before the session is saved, so the panel
    shows this request's changes as pending. The next page shows whether they were stored.
    """

    name = "Session"
    has_content = True

    def nav_title(self) -> str:
        return "Session"

    def nav_subtitle(self) -> str:
        return ", ".join(facts["state"] for facts in self._now)

    def title(self) -> str:
        return "Session"

    def url(self) -> str:
        return ""

    def process_response(self, request: Any, response: Any) -> None:
        """Collect the facts of the request's sessions, without accessing them."""
        self._now = [facts_of(session, None, saved=False) for session in traced(request)]

    def content(self) -> str:
        recent = current_app.extensions.get(RECENT, ())
        return self.jinja_env.from_string(_PAGE).render(
            now=[as_text(facts) for facts in self._now],
            recent=[as_text(facts) for facts in reversed(recent)],
        )
