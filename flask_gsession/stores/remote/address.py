"""The address of a session server, and the credentials of both sides."""

from __future__ import annotations

import ipaddress
import ssl
from pathlib import Path
from typing import NamedTuple
from urllib.parse import parse_qsl, unquote, urlsplit

from ...errors import SettingError
from .replaced import ReplacedFiles

DEFAULT_PORT = 7443
PARTS = ("leases", "blobs", "scans", "upkeep", "counts", "checks", "changes")
_OPTIONS = ("ca", "cert", "key", "name", "without")
_SOURCE = "SESSION_STORE is a gRPC URL that"
_FORM = (
    "write grpcs://host:7443?ca=/path/ca.pem&cert=/path/own.pem&key=/path/own.key, or without TLS "
    "grpc://127.0.0.1:7443 or grpc:///run/gsession.sock"
)


class Certificates(NamedTuple):
    """The contents of PEM files; None for a missing one."""

    ca: bytes | None
    chain: bytes | None
    key: bytes | None

    def __repr__(self) -> str:
        """Hides the contents."""
        return "<Certificates>"


class CertificateFiles(ReplacedFiles[Certificates]):
    """The PEM files ``ca``, ``cert`` and ``key``, which are read again after they were replaced.

    Raises ``SettingError`` with the files and their ``source`` if one of them is unusable.
    """

    def __init__(self, options: dict[str, str], source: str) -> None:
        paths: dict[str, str] = {
            name: options[name] for name in ("ca", "cert", "key") if name in options
        }
        super().__init__(paths.values(), lambda: certificates_of(paths, source), "Certificates")


class Address(NamedTuple):
    """A server's address, from a URL.

    ``target``: for gRPC. ``certificates``: None without TLS. ``name``: the name in the server's
    certificate, if it isn't the host. ``without``: parts that the remote store lacks.
    """

    target: str
    certificates: CertificateFiles | None
    token: str | None
    name: str | None
    without: frozenset[str]

    def __repr__(self) -> str:
        """Without the token and the keys."""
        return f"Address({self.target!r})"

    @classmethod
    def of(cls, url: str) -> Address:
        """The address in a ``grpcs://`` or ``grpc://`` URL.

        Reads the files that the URL names, but asks no server. Raises ``SettingError``, which never
        shows the token.
        """
        try:
            parts = urlsplit(url)
            port = parts.port
            options = dict(parse_qsl(parts.query, strict_parsing=True)) if parts.query else {}
        except ValueError:
            raise _wrong(f"can't be read; {_FORM}") from None
        secure = parts.scheme == "grpcs"
        for name in options.keys() - set(_OPTIONS):
            raise _wrong(f"has the option {name[:40]!r}; allowed: {', '.join(_OPTIONS)}")
        without = frozenset(filter(None, options.get("without", "").split(",")))
        for part in without - set(PARTS):
            raise _wrong(f"has without={part[:40]!r}; allowed: {', '.join(PARTS)}")
        host = parts.hostname
        if host is None:
            if secure or len(parts.path) < 2 or parts.fragment:
                raise _wrong(f"names no host; {_FORM}")
            target = f"unix:{unquote(parts.path)}"
        else:
            if parts.path not in ("", "/") or parts.fragment or parts.password is not None:
                raise _wrong(f"has more than a host and a port; {_FORM}")
            if not secure and not is_loopback(host):
                raise _wrong(
                    "leads to another machine without TLS, where anyone in between could read "
                    "and change sessions: use grpcs://. grpc:// is for loopback and Unix sockets"
                )
            shown = f"[{host}]" if ":" in host else host
            target = f"{shown}:{DEFAULT_PORT if port is None else port}"
        if not secure and options.keys() & {"ca", "cert", "key", "name"}:
            raise _wrong("names certificates, but grpc:// doesn't use TLS: write grpcs://")
        certificates = CertificateFiles(options, _SOURCE) if secure else None
        token = unquote(parts.username) if parts.username else None
        if token is not None and not (token.isascii() and token.isprintable()):
            raise _wrong("has a token that isn't printable ASCII")
        return cls(target, certificates, token, options.get("name"), without)


def is_loopback(host: str) -> bool:
    """Whether ``host`` is this machine. Asks no name server."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def certificates_of(options: dict[str, str], source: str) -> Certificates:
    """The contents of the files ``ca``, ``cert`` and ``key``, checked to be usable.

    Raises ``SettingError`` that names the files, and their ``source``.
    """
    if ("cert" in options) != ("key" in options):
        raise SettingError(f"{source} has only one of cert and key: name both files, or neither")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        if "ca" in options:
            context.load_verify_locations(options["ca"])
        if "cert" in options:
            context.load_cert_chain(options["cert"], options["key"], password=_no_password)
        return Certificates(
            *(
                Path(options[name]).read_bytes() if name in options else None
                for name in ("ca", "cert", "key")
            )
        )
    except (OSError, ValueError) as error:  # an SSLError is an OSError
        named = ", ".join(options[name] for name in ("ca", "cert", "key") if name in options)
        raise SettingError(
            f"{source} names a PEM file that can't be used ({error.__class__.__name__}: "
            f"{getattr(error, 'reason', None) or getattr(error, 'strerror', None) or error}). "
            f"Check whether these exist, can be read, and belong together: {named}"
        ) from None


def _no_password() -> str:
    raise ValueError("the key needs a password")


def _wrong(why: str) -> SettingError:
    return SettingError(f"{_SOURCE} {why}")
