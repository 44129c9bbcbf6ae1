"""A process for test_shop.py. It imports no test, which would take a second."""

from examples.shop.app import create_app
from examples.shop.orders import SoldOut
from examples.shop.services import Shop


def open_and_buy(folder: str, worker: int) -> tuple[str, int]:
    """Open the shop and buy until there is nothing left; its key, and how often that worked."""
    app = create_app(instance_path=folder)
    shop: Shop = app.extensions["shop"]
    sold = 0
    try:
        for number in range(30):
            shop.orders.place("mira", f"{worker}-{number}", {"OUT-302": 1, "KIT-105": 1})
            sold += 1
    except SoldOut:
        pass
    shop.sessions.close(app)
    return str(app.secret_key), sold
