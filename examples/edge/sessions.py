"""The server of the sessions: an application with no pages, for `flask gsession serve`."""

import os

from flask import Flask

from flask_gsession import Session

app = Flask(__name__)
app.secret_key = os.environ["SHOP_SECRET_KEY"]
app.config["SESSION_STORE"] = os.environ["SHOP_SESSION_STORE"]
Session(app)
