"""The facts about the visitor for pages, even while the session store doesn't answer.

The catalogue and the error pages need nothing of the session but the name and the cart in their
head. In an outage they are shown without. All other pages need the session, so they are a 503.
"""

from flask import g

from flask_gsession import StoreUnavailable, session

from . import accounts, cart, preferences
from .services import shop


def known() -> bool:
    """Whether the session can be read, and the user's values, if there is one.

    Asks the store for each once in a request, and only with a cookie.
    """
    if "visitor_known" not in g:
        try:
            preferences.current()
        except StoreUnavailable:
            g.visitor_known = False
        else:
            g.visitor_known = True
    return bool(g.visitor_known)


def forget() -> None:
    """Make this page without the session, because it has failed already."""
    g.visitor_known = False


def person() -> accounts.Person | None:
    """The signed-in person."""
    name = session.get("user") if known() else None
    return shop().accounts.find(name) if name else None


def prefs() -> preferences.Preferences:
    """The visitor's preferences, or the defaults."""
    return preferences.current() if known() else preferences.DEFAULTS


def cart_count() -> int:
    """How many pieces are in the cart."""
    return cart.count() if known() else 0
