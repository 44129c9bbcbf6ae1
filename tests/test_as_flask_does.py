"""Our session works like Flask's own for applications and libraries."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from flask import (
    Flask,
    Response,
    after_this_request,
    copy_current_request_context,
    flash,
    get_flashed_messages,
    render_template_string,
    session,
    stream_template_string,
)
from flask.sessions import NullSession, SessionInterface
from flask_login import LoginManager, UserMixin, current_user, login_user
from flask_socketio import SocketIO

from flask_gsession import Session, StoreUnavailable, TransactionMisused, UnsupportedType
from flask_gsession.errors import SessionConflict
from flask_gsession.events import SessionRotated
from tests.harness.apps import Site, SiteMaker

# After the request, in a test's block ------------------------------------------------------------


def test_flashes_and_keys_can_be_taken_after_the_request(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    visitor = site.visitor()
    with visitor:
        visitor.run(lambda session: (session.update(step=1), flash("Saved.")))
        assert session["step"] == 1
        assert session.modified
        assert get_flashed_messages() == ["Saved."]
        assert session.pop("step") == 1
        session["more"] = 1
    assert not [record for record in caplog.records if record.name == "flask_gsession"]
    assert visitor.run(lambda session: sorted(session)) == ["_flashes", "step"]


def test_modified_stays_as_it_was_when_the_session_was_saved(site: Site) -> None:
    seen: list[bool] = []
    site.app.teardown_request(lambda error: seen.append(session.modified))
    visitor = site.visitor()
    visitor.run(lambda session: session.update(a=1))
    visitor.run(lambda session: session["a"])
    visitor.run(lambda session: session.update(a=1))
    visitor.run(lambda session: session.clear())
    assert seen == [True, False, False, True]


def test_a_streamed_page_shows_messages_to_its_end(site: Site) -> None:
    layout = "<html>{% for message in get_flashed_messages() %}{{ message }}{% endfor %} end</html>"
    visitor = site.visitor()
    visitor.run(lambda session: flash("Saved."))
    page = visitor.ask(lambda session: Response(stream_template_string(layout)))
    assert page.text == "<html>Saved. end</html>"


# Templates ---------------------------------------------------------------------------------------


STORED = {"size": "XL", "handle": "@ada", "open": "from 9 to 5", "ttl": "long", "sid": "s"}


@pytest.mark.parametrize("name", STORED)
def test_a_stored_key_comes_before_our_attributes(site: Site, name: str) -> None:
    visitor = site.visitor()
    visitor.run(lambda session: session.update(STORED))
    show = "{{ session." + name + " }}"
    assert visitor.run(lambda _: render_template_string(show)) == STORED[name]
    macro = "{% macro show() %}" + show + "{% endmacro %}{{ show() }}"
    assert visitor.run(lambda _: render_template_string(macro)) == STORED[name]


def test_flasks_attributes_come_before_stored_keys(site: Site) -> None:
    """As with Flask's own session."""
    visitor = site.visitor()
    visitor.run(lambda session: session.update({"get": "x", "permanent": "y", "new": "z"}))
    page = "{{ session.get('new') }} {{ session.permanent }} {{ session.new }}"
    assert visitor.run(lambda _: render_template_string(page)) == "z False False"


def test_a_template_that_does_not_use_the_session_costs_nothing(site: Site) -> None:
    site.app.add_url_rule("/page", "page", lambda: render_template_string("a page"))
    visitor = site.visitor()
    visitor.run(lambda session: session.update(a=1))
    before = list(site.store.calls)
    response = visitor.get("/page")
    assert site.store.calls == before
    assert "Vary" not in response.headers


def test_a_template_variable_named_session_wins(site: Site) -> None:
    page = "{{ session.size }}"
    visitor = site.visitor()
    assert visitor.run(lambda _: render_template_string(page, session={"size": 1})) == "1"


# A wrapped interface, and saving by hand ---------------------------------------------------------


class Wrapper(SessionInterface):
    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def open_session(self, *arguments: Any) -> Any:
        return self.inner.open_session(*arguments)

    def save_session(self, *arguments: Any) -> None:
        self.inner.save_session(*arguments)


def test_the_session_of_a_wrapped_interface_is_the_requests_own(site: Site) -> None:
    site.app.session_interface = Wrapper(site.app.session_interface)
    visitor = site.visitor()

    def view(session: Any) -> None:
        session["by flask"] = 1
        site.ext.session["by ext"] = 2
        of_ext: Any = site.ext.session
        assert of_ext._get_current_object() is session._get_current_object()

    visitor.run(view)
    assert visitor.run(dict) == {"by flask": 1, "by ext": 2}
    before = visitor.cookie
    visitor.run(lambda session: session.rotate())  # the response carries the new token
    assert visitor.cookie != before
    visitor.run(lambda _: site.ext.session.destroy())
    assert visitor.cookie is None


def test_an_interface_that_answers_for_null_sessions_itself_still_rotates(site: Site) -> None:
    class Own(type(site.app.session_interface)):  # type: ignore[misc]
        def is_null_session(self, obj: object) -> bool:
            return isinstance(obj, NullSession)

    inner: Any = site.app.session_interface
    site.app.session_interface = Own(inner.repository, inner.store, owns_store=False)
    visitor = site.visitor()
    visitor.run(lambda session: session.update(a=1))
    before = visitor.cookie
    visitor.run(lambda session: session.rotate())
    assert visitor.cookie != before


def test_a_test_clients_transaction_raises_errors_of_the_save(site: Site) -> None:
    """Flask asks whether this session is null as well, but it belongs to no request."""

    def fail() -> None:
        raise StoreUnavailable("drill")

    visitor = site.visitor()
    visitor.run(lambda session: session.update(a=1))
    site.store.before("save", fail)
    client = site.app.test_client()
    name = site.cookie_name
    client.set_cookie(name, visitor.cookie or "")
    with pytest.raises(StoreUnavailable), client.session_transaction() as session:
        session["a"] = 2


def save(site: Site, session: Any) -> None:
    site.app.session_interface.save_session(site.app, session, site.app.response_class())


def test_saving_by_hand_stores_and_the_request_continues(site: Site) -> None:
    visitor = site.visitor()

    def view(session: Any) -> None:
        session["a"] = 1
        save(site, session)
        assert len(site.stored()) == 1
        session["b"] = 2

    visitor.run(view)
    assert visitor.run(dict) == {"a": 1, "b": 2}


def test_a_view_may_ask_whether_its_session_is_null(site: Site) -> None:
    """As Flask does, a view may ask whether the session is null before it saves it by hand."""
    visitor = site.visitor()
    interface = site.app.session_interface

    def view(session: Any) -> None:
        session["a"] = 1
        for asked in (session, session._get_current_object()):
            assert not interface.is_null_session(asked)
            save(site, asked)
        session["b"] = 2

    visitor.run(view)
    assert visitor.run(dict) == {"a": 1, "b": 2}

    def fail() -> None:
        raise StoreUnavailable("drill")

    def in_an_outage(session: Any) -> None:
        session.accessed = True  # Flask sets it from 3.1.3 on
        assert not interface.is_null_session(session)
        site.store.before("load", fail)
        with pytest.raises(StoreUnavailable):
            session.get("a")

    visitor.run(in_an_outage)


@pytest.mark.parametrize("error", [StoreUnavailable, UnsupportedType])
def test_saving_by_hand_raises_errors_of_the_save(site: Site, error: type[Exception]) -> None:
    def fail() -> None:
        raise StoreUnavailable("drill")

    with site.app.test_request_context():
        session["a"] = 1 if error is StoreUnavailable else 1j
        if error is StoreUnavailable:
            site.store.before("create", fail)
        with pytest.raises(error):
            save(site, session._get_current_object())  # type: ignore[attr-defined]


def test_saving_by_hand_keeps_the_token_and_leaves_the_rotation_to_flask(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    visitor = site.visitor()
    visitor.run(lambda session: session.update(a=1))
    before = visitor.cookie

    def view(session: Any) -> str:
        session["user"] = "ada"
        session.rotate(grace=0)
        save(site, session)
        assert not site.happened(SessionRotated)
        return str(session.handle)

    visitor.run(view)
    assert "keeps its token" in caplog.text
    assert visitor.cookie != before
    assert visitor.run(dict) == {"a": 1, "user": "ada"}


def test_a_sign_in_by_hand_with_an_old_token_is_refused(site: Site) -> None:
    visitor = site.visitor()
    visitor.run(lambda session: session.update(user="ada", cart=1))
    holder = visitor.another_tab()
    visitor.run(lambda session: session.rotate(grace=60))

    def view(session: Any) -> None:
        session["user"] = "eve"
        session.rotate(grace=0)
        with pytest.raises(SessionConflict):
            save(site, session)

    holder.ask(view)
    assert visitor.run(dict) == {"user": "ada", "cart": 1}


class User(UserMixin):
    id = "ada"


def test_saving_by_hand_inside_a_block_is_refused(site: Site) -> None:
    def view(session: Any) -> None:
        with session.lock():
            session["b"] = 1
            with pytest.raises(TransactionMisused, match="still open"):
                save(site, session)

    visitor = site.visitor()
    visitor.run(lambda session: session.update(a=1))
    visitor.run(view)
    assert visitor.run(dict) == {"a": 1, "b": 1}


@pytest.mark.parametrize("store", ["memory://", "sqlite"])
def test_signing_in_over_a_socket(store: str, tmp_path: Any) -> None:
    app = Flask("chat", instance_path=str(tmp_path))
    app.secret_key = "k" * 32
    ext = Session(app, store=None if store == "sqlite" else store)
    further = Session(app, store="memory://", cookie_name="further")
    LoginManager(app).user_loader(lambda _: User())
    socketio = SocketIO(app, manage_session=False, async_mode="threading")

    @app.get("/start")
    def start() -> dict[str, str]:
        session["cart"] = further.session["note"] = "mug"
        return {}

    @app.get("/")
    def home() -> dict[str, Any]:
        return {
            "user": current_user.get_id(),
            "cart": session.get("cart"),
            "note": further.session.get("note"),
        }

    def log_in_with_a_block(kind: str) -> None:
        with session.lock() if kind == "lock" else session.transaction():
            login_user(User())

    socketio.on_event("login", lambda _: login_user(User()) and None)
    socketio.on_event("login with a block", log_in_with_a_block)
    socketio.on_event("note", lambda text: further.session.update(note=text))

    client = app.test_client()
    client.get("/start")
    socket = socketio.test_client(app, flask_test_client=client)
    socket.emit("login", {})
    assert client.get("/").json == {"user": "ada", "cart": "mug", "note": "mug"}
    for kind in ("lock", "transaction"):
        socket.emit("login with a block", kind)
        assert client.get("/").json == {"user": "ada", "cart": "mug", "note": "mug"}
    socket.emit("note", "of the further session alone")
    assert client.get("/").json["note"] == "of the further session alone"
    ext.close(app)


def test_code_for_flask_session_finds_its_attributes(site: Site) -> None:
    visitor = site.visitor()
    visitor.run(lambda session: session.update(a=1))
    assert visitor.run(lambda session: session.sid == session.handle is not None)
    before, old = visitor.cookie, visitor.another_tab()
    interface: Any = site.app.session_interface
    visitor.run(lambda session: interface.regenerate(session))
    assert visitor.cookie != before
    assert visitor.run(dict) == {"a": 1}
    assert old.run(dict) == {}


# Flashed messages of parallel requests -----------------------------------------------------------


@pytest.mark.parametrize("shown_by", ["nobody", "mine", "theirs"])
def test_of_parallel_messages_none_is_lost(site: Site, shown_by: str) -> None:
    visitor = site.visitor()
    visitor.run(lambda session: (flash("first"), session.update(other=1)))
    tab = visitor.another_tab()

    def theirs(session: Any) -> None:
        if shown_by == "theirs":
            get_flashed_messages()
        flash("theirs")

    def mine(session: Any) -> None:
        session.get("_flashes")
        site.before_a_write(lambda: tab.run(theirs))
        if shown_by == "mine":
            get_flashed_messages()
        else:
            flash("mine")

    visitor.run(mine)
    expected = {
        "nobody": ["first", "theirs", "mine"],
        "mine": ["theirs"],
        "theirs": ["theirs", "mine"],
    }[shown_by]
    assert visitor.run(lambda _: get_flashed_messages()) == expected


def test_a_message_flashed_by_another_request_survives(site: Site) -> None:
    visitor = site.visitor()
    visitor.run(lambda session: flash("first"))
    tab = visitor.another_tab()
    site.before_a_write(lambda: tab.run(lambda session: flash("theirs")))
    assert visitor.run(lambda _: get_flashed_messages()) == ["first"]
    assert visitor.run(lambda _: get_flashed_messages()) == ["theirs"]


# Hooks -------------------------------------------------------------------------------------------


def test_a_hook_may_be_the_first_to_sign_in(make_site: SiteMaker) -> None:
    """It runs while Flask processes the response, which can still carry a new token."""
    site = make_site()
    turn = iter([False, True])

    @site.app.after_request
    def sign_in(response: Response) -> Response:
        if next(turn, False):
            session["user"] = "ada"
            session.rotate(grace=0)
        return response

    visitor = site.visitor()
    visitor.run(lambda session: session.update(a=1))
    before = visitor.cookie
    visitor.get("/untouched")
    assert visitor.cookie != before
    assert visitor.run(dict) == {"a": 1, "user": "ada"}


@pytest.mark.parametrize("debug", [False, True])
def test_an_outage_that_only_a_hook_meets_is_a_503(
    make_site: SiteMaker, debug: bool, caplog: pytest.LogCaptureFixture
) -> None:
    site = make_site(debug=debug)

    def fail() -> None:
        raise StoreUnavailable("drill")

    def look(response: Response) -> Response:
        session.get("a")
        return response

    visitor = site.visitor()
    visitor.run(lambda session: session.update(a=1))
    site.app.config["PROPAGATE_EXCEPTIONS"] = False
    site.store.before("load", fail)
    response = visitor.ask(lambda _: after_this_request(look) and None)
    assert response.status_code == 503
    if debug:  # else the hook raises, and an error page is made
        assert "Exception on" not in caplog.text

    def look_again(response: Response) -> Response:
        session.shared.get("a")
        return response

    def look_first(session: Any) -> None:
        session.bind("ada")
        site.store.before("load", fail)
        after_this_request(look_again)

    assert visitor.ask(look_first).status_code == 503
    site.app.after_request_funcs.setdefault(None, []).append(look)
    site.store.before("load", fail)
    response = visitor.get("/untouched")
    assert (response.status_code, "Retry-After" in response.headers) == (503, True)


def test_a_thread_may_be_the_first_to_look_at_the_session(site: Site) -> None:
    """With a copy of the request's context, which Flask does not process the response in."""
    visitor = site.visitor()
    visitor.run(lambda session: session.update(a=1))
    before = visitor.cookie

    def view(_: Any) -> None:
        @copy_current_request_context
        def sign_in() -> None:
            session["user"] = "ada"
            regenerate: Any = site.app.session_interface
            regenerate.regenerate(session._get_current_object())  # type: ignore[attr-defined]

        thread = threading.Thread(target=sign_in)
        thread.start()
        thread.join()

    visitor.run(view)
    assert visitor.cookie != before
    assert visitor.run(dict) == {"a": 1, "user": "ada"}


# Changed objects ---------------------------------------------------------------------------------


def begin_transaction(session: Any) -> None:
    with session.transaction():
        session["visits"] += 1


def take_lock(session: Any) -> None:
    with session.lock():
        session["visits"] += 1


BEGINNINGS = {
    "transaction": begin_transaction,
    "lock": take_lock,
    "reload": lambda session: session.reload(),
    "update_atomic": lambda session: session.update_atomic("cart", lambda cart: [*cart, "pen"]),
}


@pytest.mark.parametrize("way", BEGINNINGS)
def test_a_late_change_of_an_object_from_before_is_logged(
    site: Site, way: str, caplog: pytest.LogCaptureFixture
) -> None:
    def view(session: Any) -> None:
        cart = session["cart"]
        BEGINNINGS[way](session)
        cart.append("secret mug")

    visitor = site.visitor()
    visitor.run(lambda session: session.update(cart=[], visits=0))
    visitor.run(view)
    (record,) = [record for record in caplog.records if record.name == "flask_gsession"]
    assert record.levelno == logging.ERROR
    assert "session['cart']" in record.getMessage()
    assert "secret" not in record.getMessage()
    assert "secret mug" not in visitor.run(lambda session: session["cart"])


@pytest.mark.parametrize("way", BEGINNINGS)
def test_an_object_that_is_put_back_or_left_alone_is_not_logged(
    site: Site, way: str, caplog: pytest.LogCaptureFixture
) -> None:
    def view(session: Any) -> None:
        cart, untouched = session["cart"], session["other"]
        BEGINNINGS[way](session)
        session["cart"] = cart
        cart.append("mug")
        assert untouched == [1]

    visitor = site.visitor()
    visitor.run(lambda session: session.update(cart=[], visits=0, other=[1]))
    visitor.run(view)
    assert not [record for record in caplog.records if record.name == "flask_gsession"]
    assert visitor.run(lambda session: session["cart"]) == ["mug"]


def test_emptying_a_large_session_takes_linear_time(site: Site) -> None:
    """Counted in looks at keys, not in seconds."""
    visitor = site.visitor()
    keys = [f"k{number}" for number in range(500)]
    visitor.run(lambda session: session.update(dict.fromkeys(keys, 1)))

    def view(session: Any) -> Iterator[str]:
        taken = []
        while session:
            taken.append(session.popitem()[0])
        return iter(taken)

    assert list(visitor.run(view)) == keys[::-1]
    assert visitor.cookie is None
