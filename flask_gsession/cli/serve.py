"""``flask gsession serve``."""

from __future__ import annotations

import signal
import sys
from typing import TYPE_CHECKING

import click
from flask import Flask, current_app
from flask.cli import with_appcontext

from ..errors import SettingError
from ..interface import GSessionInterface
from ..processes import process
from .common import choose_interface, interfaces, print_store, session_option

if TYPE_CHECKING:
    from ..sharing.server import Server, Service

_GRACE = 2.0  # seconds, for running calls at the end


@click.command()
@click.option(
    "--grpc",
    "address",
    metavar="HOST:PORT",
    required=True,
    help="Where to listen: 0.0.0.0:7443, or unix:/run/gsession.sock.",
)
@click.option("--cert", metavar="FILE", help="The server's certificate chain, PEM.")
@click.option("--key", metavar="FILE", help="The key of that certificate, PEM.")
@click.option("--ca", metavar="FILE", help="The authority of the callers' certificates, PEM.")
@click.option("--grants", metavar="FILE", help="What each service may do, TOML.")
@click.option(
    "--threads", metavar="N", default=32, show_default=True, help="Calls to answer at a time."
)
@click.option("--user", metavar="KEY", help="The session key with the user's id.")
@click.option("--ext-authz", is_flag=True, help="Answer Envoy, too.")
@session_option
@with_appcontext
def serve(
    address: str,
    cert: str | None,
    key: str | None,
    ca: str | None,
    grants: str | None,
    threads: int,
    user: str | None,
    ext_authz: bool,
    cookie: str | None,
) -> None:
    """Serve the sessions to other services.

    Serves the whole store, or single values, over gRPC. Every service needs a grant in the grants
    file. Without that file, you can serve only a Unix socket, and anyone who may open it has full
    power over the sessions. Ends on SIGTERM and Ctrl-C.
    """
    interface = choose_interface(cookie, serves=True)
    app = current_app._get_current_object()  # type: ignore[attr-defined]  # a proxy
    paths = {"cert": cert, "key": key, "ca": ca}
    given = {name: path for name, path in paths.items() if path is not None}
    if not 1 <= threads <= 1000:
        raise click.UsageError("--threads must be 1 to 1000")
    try:
        services = _services(app, interface, user, ext_authz)
    except ImportError as error:
        raise click.ClickException(str(error)) from None
    server = _server(services, interface, address, given, grants, threads)
    process.serves = True
    print_store(interface)
    server.start()
    click.echo(f"Serving on {address}", err=True)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: server.stop(_GRACE))
    server.wait()
    sys.exit(0)


def _services(
    app: Flask, interface: GSessionInterface, user: str | None, ext_authz: bool
) -> list[Service]:
    """The services to serve. Raises ``ImportError`` with the missing extra."""
    try:
        from ..sharing.store_service import StoreService
        from ..sharing.values_service import ValuesService
    except ImportError as error:
        raise ImportError(
            f"{error.name} is not installed: install the grpc extra, flask-gsession[grpc]"
        ) from None
    ext = next(ext for ext, each in interfaces().items() if each is interface)
    services: list[Service] = [
        StoreService(interface.repository.store),
        ValuesService(app, ext, user),
    ]
    if ext_authz:
        from ..sharing.ext_authz import ExtAuthzService

        services.append(ExtAuthzService(app, ext, user))
    return services


def _server(
    services: list[Service],
    interface: GSessionInterface,
    address: str,
    given: dict[str, str],
    grants_path: str | None,
    threads: int,
) -> Server:
    """A server that listens, but doesn't answer yet. Raises ``SettingError``."""
    from ..sharing.grants import FULL_ACCESS, Grants, GrantsFile
    from ..sharing.server import Server, check_address
    from ..stores.remote.address import CertificateFiles

    files = CertificateFiles(given, "The command") if given else None
    check_address(address, None if files is None else files.current)
    grants: Grants | GrantsFile
    if grants_path is not None:
        grants = GrantsFile(grants_path)
    elif address.startswith("unix:"):
        grants = FULL_ACCESS
    else:
        raise SettingError(
            f"{address} is open to other users and machines: pass --grants FILE, which lists what "
            "each service may do, or listen on a Unix socket"
        )
    server = Server(services, grants, interface.repository.events, threads)
    server.listen(address, files)
    return server
