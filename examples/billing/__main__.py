"""Start all three: `python -m examples.billing --port 5000`."""

import argparse
import hashlib
import secrets
import tempfile
from pathlib import Path

from ..launching import run_flask

HOST = "127.0.0.1"

GRANTS = """
[shop]
token_sha256 = "{shop}"
store = true  # full power, as Flask-GSession needs it

[billing]
token_sha256 = "{billing}"
read = ["total"]
write = ["invoice", "total", "cart"]
"""


def main() -> None:
    """Run the three processes until one of them ends, or this is interrupted."""
    parser = argparse.ArgumentParser(prog="python -m examples.billing", description=__doc__)
    parser.add_argument("--port", type=int, default=5000, help="the billing gets the next one")
    port: int = parser.parse_args().port
    tokens = {name: secrets.token_urlsafe(32) for name in ("shop", "billing")}
    digests = {name: hashlib.sha256(token.encode()).hexdigest() for name, token in tokens.items()}
    sessions = f"{HOST}:{port + 2}"
    # Each process gets its own secrets only; the billing has no SECRET_KEY.
    urls = {"SHOP_URL": f"http://{HOST}:{port}/", "BILLING_URL": f"http://{HOST}:{port + 1}"}
    secret_key = {"SHOP_SECRET_KEY": secrets.token_urlsafe(32)}
    store = {"SHOP_SESSION_STORE": f"grpc://{tokens['shop']}@{sessions}"}
    billing = {"BILLING_SESSIONS": sessions, "BILLING_TOKEN": tokens["billing"]}
    with tempfile.TemporaryDirectory() as folder:
        grants = Path(folder, "grants.toml")
        grants.write_text(GRANTS.format(**digests))
        serve = ("gsession", "serve", "--grpc", sessions, "--grants", str(grants))
        commands = [
            (("--app", "examples.billing.sessions", *serve), secret_key),
            (
                ("--app", "examples.billing.shop", "run", "--port", str(port)),
                secret_key | store | urls,
            ),
            (
                ("--app", "examples.billing.billing", "run", "--port", str(port + 1)),
                billing | urls,
            ),
        ]
        run_flask(commands, f" * The shop is at {urls['SHOP_URL']}")


if __name__ == "__main__":
    main()
