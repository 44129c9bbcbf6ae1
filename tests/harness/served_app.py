"""The application of `flask gsession serve` in tests; its settings are `FLASK_SESSION_*`."""

from flask import Flask

from flask_gsession import Session

app = Flask(__name__)
app.secret_key = "workers"  # as in tests/harness/workers_app.py
app.config["SESSION_STORE_TIMEOUT"] = 10
app.config.from_prefixed_env()
ext = Session(app)
