"""The services that views use, built once per application."""

from dataclasses import dataclass
from typing import cast

from flask import current_app

from flask_gsession import Session

from .accounts import Accounts
from .catalogue import Catalogue
from .orders import Orders

EXTENSION = "shop"


@dataclass(frozen=True, slots=True)
class Shop:
    """The parts of one shop. `sessions_in` names the session store for people."""

    catalogue: Catalogue
    orders: Orders
    accounts: Accounts
    sessions: Session
    sessions_in: str


def shop() -> Shop:
    """The shop of the application that is serving this request."""
    return cast(Shop, current_app.extensions[EXTENSION])
