"""Start the head office, the branch and the line between: `python -m examples.edge --port 5000`."""

import argparse
import hashlib
import secrets
import tempfile
from pathlib import Path
from urllib.parse import quote

from ..launching import run_flask
from .line import Line, serve_switch

HOST = "127.0.0.1"
GRANTS = '[shop]\ntoken_sha256 = "{}"\nstore = true\n'


def main() -> None:
    """Run the processes until one of them ends, or this is interrupted."""
    parser = argparse.ArgumentParser(prog="python -m examples.edge", description=__doc__)
    parser.add_argument("--port", type=int, default=5000, help="the next four are used as well")
    port: int = parser.parse_args().port
    office, branch, switch, line, sessions = range(port, port + 5)
    token = secrets.token_urlsafe(32)
    remote = quote(f"grpc://{token}@{HOST}:{line}", safe="")
    own = {"SHOP_SECRET_KEY": secrets.token_urlsafe(32), "SHOP_LINE": f"http://{HOST}:{switch}"}
    serve_switch(Line(HOST, line, sessions), HOST, switch, f"http://{HOST}:{branch}/")
    with tempfile.TemporaryDirectory() as folder:
        grants = Path(folder, "grants.toml")
        grants.write_text(GRANTS.format(hashlib.sha256(token.encode()).hexdigest()))
        serve = ("gsession", "serve", "--grpc", f"{HOST}:{sessions}", "--grants", str(grants))
        store = {
            "office": f"grpc://{token}@{HOST}:{sessions}",
            "branch": f"edge+sqlite:///{folder}/edge.sqlite3?remote={remote}&offline_for=1h",
        }
        commands = [
            (
                ("--app", "examples.edge.sessions", *serve),
                own | {"SHOP_SESSION_STORE": f"sqlite:///{folder}/sessions.sqlite3"},
            ),
            (
                ("--app", "examples.edge.shop", "run", "--port", str(office)),
                own | {"SHOP_SESSION_STORE": store["office"], "SHOP_PLACE": "Head office"},
            ),
            (
                ("--app", "examples.edge.shop", "run", "--port", str(branch)),
                own | {"SHOP_SESSION_STORE": store["branch"], "SHOP_PLACE": "Branch"},
            ),
        ]
        run_flask(
            commands,
            f" * The head office is at http://{HOST}:{office}/\n"
            f" * The branch is at http://{HOST}:{branch}/",
        )


if __name__ == "__main__":
    main()
