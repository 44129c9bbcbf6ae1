"""Serve the demo shop for a look around: `python -m examples.shop --port 5055`."""

import argparse
import os
import socket
import sys

from flask_gsession import GSessionError, SettingError, StoreUnavailable

from .app import create_app
from .services import EXTENSION, Shop

HOST = "127.0.0.1"


def main() -> None:
    """Serve the shop on this machine until it is interrupted."""
    parser = argparse.ArgumentParser(prog="python -m examples.shop", description=__doc__)
    parser.add_argument("--port", type=int, default=5000)
    parser.add_argument("--instance", metavar="FOLDER", help="for stock, orders and secret key")
    asked = parser.parse_args()
    port: int = asked.port
    try:
        socket.create_server((HOST, port)).close()
    except (OSError, OverflowError) as error:
        number = getattr(error, "errno", None)
        why = os.strerror(number) if number else str(error).rstrip(".")
        sys.exit(f"Can't use port {port}: {why}. Choose another one: make demo PORT=5055")
    try:
        app = create_app(instance_path=asked.instance)
    except SettingError as error:
        sys.exit(f"{error}\nGive the shop another one: make demo STORE=redis://localhost:6379")
    shop: Shop = app.extensions[EXTENSION]
    print(f" * Sessions are kept in {shop.sessions_in}", flush=True)
    try:
        shop.sessions.store(app).load("0" * 43)
    except StoreUnavailable as error:
        print(
            f" * It does not answer yet: {error}\n"
            " * The shop opens anyway. Pages that need the session get 503 until it does",
            flush=True,
        )
    except GSessionError:
        pass  # it answers, and what is wrong with a record is the session's business
    # The reloader would start this again, and find the port taken.
    app.run(HOST, port, use_reloader=False)


if __name__ == "__main__":
    main()
