"""The page that proxies ask, with the configurations of the documentation, in real proxies."""

from __future__ import annotations

import http.client
import re
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from flask import Flask, request

from flask_gsession.errors import StoreUnavailable
from flask_gsession.sharing.forward_auth import verify_blueprint
from tests.harness.apps import Site
from tests.harness.proxies import ask, free_port, running, served

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "how-to" / "verify-visitors.md").read_text()


BEGINS = {"nginx": "```nginx\n", "haproxy": "```text\n# haproxy.cfg\n", "lua": "```lua\n"}


def documented(name: str) -> str:
    block = re.search(rf"^{BEGINS[name]}(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
    assert block, f"the page has no configuration of {name}"
    return block[1]


class Setup(NamedTuple):
    """A proxy at a port, in front of a service that echoes its request."""

    port: int
    site: Site


def a_service() -> Flask:
    app = Flask(__name__)

    @app.route("/", defaults={"path": ""})
    @app.route("/<path:path>")
    def show(path: str) -> dict[str, Any]:
        names = ("X-Session-User", "X-Session-Role")
        return {name: request.headers.get(name, "") for name in names}

    return app


def nginx(stack: ExitStack, folder: Path, text: str, port: int) -> None:
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    paths = "".join(f"{kind}_temp_path {folder}/{kind};\n" for kind in kinds)
    config = folder / "nginx.conf"
    config.write_text(
        f"daemon off; master_process off; pid {folder}/pid; error_log stderr;\n"
        f"events {{}}\nhttp {{ access_log off;\n{paths}\n{text}}}\n"
    )
    stack.enter_context(running("nginx", port, folder, "-e", "stderr", "-c", str(config)))


def haproxy(stack: ExitStack, folder: Path, text: str, port: int) -> None:
    (folder / "haproxy.cfg").write_text(text.replace("session.lua", f"{folder}/session.lua"))
    stack.enter_context(running("haproxy", port, folder, "-f", str(folder / "haproxy.cfg")))


@pytest.fixture(scope="module", params=["nginx", "haproxy"])
def setup(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Any]:
    folder, port = tmp_path_factory.mktemp(request.param), free_port()
    with ExitStack() as stack:
        site = stack.enter_context(Site("memory://", "", time.time))
        site.app.register_blueprint(verify_blueprint(site.ext, values=["role"]))
        shop, service = (
            stack.enter_context(served(site.app)),
            stack.enter_context(served(a_service())),
        )

        def placed(text: str) -> str:
            text = text.replace("127.0.0.1:5000", f"127.0.0.1:{shop}")
            text = text.replace("127.0.0.1:6000", f"127.0.0.1:{service}")
            return re.sub(r"(listen |bind :)8080", rf"\g<1>{port}", text).replace(
                f"bind :{port}", f"bind 127.0.0.1:{port}"
            )

        (folder / "session.lua").write_text(placed(documented("lua")))
        start = {"nginx": nginx, "haproxy": haproxy}[request.param]
        start(stack, folder, placed(documented(request.param)), port)
        yield Setup(port, site)


def cookie_of(site: Site, **values: Any) -> str:
    visitor = site.visitor()
    visitor.run(lambda session: session.update(values))
    return f"other=1; session={visitor.cookie}"


def test_a_visitor_is_named_to_the_service(setup: Setup) -> None:
    cookie = cookie_of(setup.site, _user_id="Zoë", role="editor")
    for method in ("GET", "OPTIONS"):
        status, (body, _) = ask(
            setup.port, "/orders/1", method, Cookie=cookie, X_Session_User="admin"
        )
        assert status == 200
        if method == "GET":
            assert body == '{"X-Session-Role":"editor","X-Session-User":"Zo%C3%AB"}\n'


def test_headers_of_clients_are_replaced(setup: Setup) -> None:
    cookie = cookie_of(setup.site, _user_id="17")
    spoofed = {"X_Session_Role": "root", "X_Session_User": "admin"}
    status, (body, _) = ask(setup.port, Cookie=cookie, **spoofed)
    assert (status, body) == (200, '{"X-Session-Role":"","X-Session-User":"17"}\n')
    # With underscores, which mean the same header to a WSGI application.
    status, (body, _) = ask(setup.port, Cookie=cookie, X__Session__Role="root")
    assert (status, body) == (200, '{"X-Session-Role":"","X-Session-User":"17"}\n')


def test_headers_of_clients_are_replaced_however_they_are_written(setup: Setup) -> None:
    """Twice, in mixed case, and with underscores in some places."""
    cookie = cookie_of(setup.site, _user_id="17")
    names = (
        "x-SESSION-user",
        "X-Session-User",
        "X_Session-User",
        "x-session_ROLE",
        "X-Session-Role",
    )
    with closing(http.client.HTTPConnection("127.0.0.1", setup.port, timeout=20)) as client:
        client.putrequest("GET", "/")
        for line in (*names, *names):
            client.putheader(line, "admin")
        client.putheader("Cookie", cookie)
        client.endheaders()
        response = client.getresponse()
        assert response.status == 200
        assert response.read() == b'{"X-Session-Role":"","X-Session-User":"17"}\n'


def test_nobody_gets_through(setup: Setup) -> None:
    anonymous = cookie_of(setup.site, cart=["mug"])
    for method in ("GET", "POST", "OPTIONS"):
        assert ask(setup.port, method=method)[0] == 401
        assert ask(setup.port, method=method, X_Session_User="admin")[0] == 401
        assert ask(setup.port, method=method, Cookie=anonymous, X_Session_User="admin")[0] == 401


def test_an_outage_is_503_and_never_401(setup: Setup) -> None:
    def fail() -> None:
        raise StoreUnavailable("drill: the store is down")

    cookie = cookie_of(setup.site, _user_id="17")
    setup.site.store.before("load", fail)
    status, (_, headers) = ask(setup.port, Cookie=cookie)
    assert status == 503
    assert headers["Retry-After"] == "1"
    assert ask(setup.port, Cookie=cookie)[0] == 200
