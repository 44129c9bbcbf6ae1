"""A panel for Flask-DebugToolbar: what the request did with its session."""

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
<p>Nothing is known: SESSION_DEBUG is off, or the application has no Session.</p>
{% endfor %}
{% if recent %}
<h4>The requests before, to this process</h4>
{% for text in recent %}<pre>{{ text }}</pre>{% endfor %}
{% endif %}
"""


class SessionPanel(DebugPanel):
    """Shows the debug dump of a request beside its page, and those of the requests before.

    Name it in ``DEBUG_TB_PANELS``. The toolbar makes its page before the session is saved, so
    what the request changed is shown as pending; the next page shows what became of it.
    """

    name = "Session"
    has_content = True

    def nav_title(self) -> str:
        """What the bar says."""
        return "Session"

    def nav_subtitle(self) -> str:
        """What the bar says below that."""
        return ", ".join(facts["state"] for facts in self._now)

    def title(self) -> str:
        """What stands above the panel."""
        return "Session"

    def url(self) -> str:
        """The panel has no page of its own."""
        return ""

    def process_response(self, request: Any, response: Any) -> None:
        """Look at the sessions of the request, without touching them."""
        self._now = [facts_of(session, None, saved=False) for session in traced(request)]

    def content(self) -> str:
        """The panel, as HTML."""
        recent = current_app.extensions.get(RECENT, ())
        return self.jinja_env.from_string(_PAGE).render(
            now=[as_text(facts) for facts in self._now],
            recent=[as_text(facts) for facts in reversed(recent)],
        )
