"""Accounts, a login and a logout in one file: ``flask --app login_app run``."""

import os
import sqlite3
from pathlib import Path

from flask import Flask, flash, g, redirect, render_template_string, url_for
from flask_login import (
    LoginManager,
    UserMixin,
    login_required,
    login_user,
    logout_user,
)
from flask_wtf import CSRFProtect, FlaskForm
from werkzeug.security import check_password_hash, generate_password_hash
from wtforms import BooleanField, PasswordField, StringField
from wtforms.validators import InputRequired, Length

from flask_gsession import Session, StoreUnavailable, session

app = Flask(__name__)
app.secret_key = os.environ.get("SECRET_KEY", "change me")
# A form from before the login is not valid after it, and otherwise as long as the session.
app.config["SESSION_RENEW_CSRF"] = True
app.config["WTF_CSRF_TIME_LIMIT"] = None
# Flask-Login keeps the page to return to in the session, not in the address of the form.
app.config["USE_SESSION_FOR_NEXT"] = True
app.config["SESSION_COOKIE_SAMESITE"] = "Lax"
Session(app)  # sessions in instance/gsession.sqlite3
CSRFProtect(app)
logins = LoginManager(app)
logins.login_view = "login"

# -- Accounts: a table of names and password hashes


def database():
    if "database" not in g:
        path = Path(app.instance_path) / "accounts.sqlite3"
        path.parent.mkdir(parents=True, exist_ok=True)
        g.database = sqlite3.connect(path)
        g.database.execute("CREATE TABLE IF NOT EXISTS account (name TEXT PRIMARY KEY, hash TEXT)")
    return g.database


@app.teardown_appcontext
def close_database(error):
    if "database" in g:
        g.pop("database").close()


class User(UserMixin):
    def __init__(self, name):
        self.id = name


@logins.user_loader
def load_user(name):
    row = database().execute("SELECT 1 FROM account WHERE name = ?", [name]).fetchone()
    return User(name) if row else None


NOBODY = generate_password_hash("")  # so that an unknown name takes as long as a wrong password


def password_matches(name, password):
    query = "SELECT hash FROM account WHERE name = ?"
    row = database().execute(query, [name]).fetchone()
    return check_password_hash(row[0] if row else NOBODY, password) and row is not None


# -- Pages


class Credentials(FlaskForm):
    name = StringField("Name", [InputRequired(), Length(max=40)])
    password = PasswordField("Password", [InputRequired(), Length(min=8, max=200)])


class LoginForm(Credentials):
    remember = BooleanField("Stay signed in")


PAGE = """
<!doctype html>
<meta name="viewport" content="width=device-width">
<title>{{ title }}</title>
<h1>{{ title }}</h1>
{% for message in get_flashed_messages() %}<p role="status">{{ message }}</p>{% endfor %}
{% if form %}
  <form method="post">
    {{ form.hidden_tag() }}
    {% for field in form if field.name != "csrf_token" %}
      <p>{{ field.label }} {{ field }} {{ field.errors | join(" ") }}</p>
    {% endfor %}
    <button>{{ title }}</button>
  </form>
  <p><a href="{{ url_for('login') }}">Sign in</a> or
    <a href="{{ url_for('register') }}">create an account</a></p>
{% else %}
  <p>Hello {{ current_user.id }}. This is visit number {{ visits }}.</p>
  <form method="post" action="{{ url_for('logout') }}">
    <input type="hidden" name="csrf_token" value="{{ csrf_token() }}">
    <button>Sign out</button>
  </form>
{% endif %}
"""


@app.get("/")
@login_required
def home():
    session["visits"] = session.get("visits", 0) + 1
    return render_template_string(PAGE, title="Home", visits=session["visits"])


@app.route("/register", methods=["GET", "POST"])
def register():
    form = Credentials()
    if form.validate_on_submit():
        row = [form.name.data, generate_password_hash(form.password.data)]
        try:
            with database() as connection:
                connection.execute("INSERT INTO account VALUES (?, ?)", row)
        except sqlite3.IntegrityError:
            flash("That name is taken.")
        else:
            login_user(User(form.name.data))
            return redirect(url_for("home"))
    return render_template_string(PAGE, title="Create an account", form=form)


@app.route("/login", methods=["GET", "POST"])
def login():
    form = LoginForm()
    if form.validate_on_submit():
        if password_matches(form.name.data, form.password.data):
            login_user(User(form.name.data))  # the session gets a new token here
            session.permanent = form.remember.data  # 31 days instead of until the browser closes
            return redirect(session.pop("next", None) or url_for("home"))
        flash("Wrong name or password.")
    return render_template_string(PAGE, title="Sign in", form=form)


@app.post("/logout")
@login_required
def logout():
    logout_user()
    session.destroy()  # the session is gone from the store when this returns
    return redirect(url_for("login"))


@app.errorhandler(StoreUnavailable)
def outage(error):
    return "Sessions can't be read or saved right now. Please try again in a minute.", 503
