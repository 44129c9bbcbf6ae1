"""The permissions of each service, from a file. Without an entry, a service may do nothing."""

from __future__ import annotations

import hashlib
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import SettingError
from ..stores.remote.replaced import ReplacedFiles

_FLAGS = ("store", "verify", "revoke")
_KEYS = ("read", "write")
_FIELDS = ("certificate", "token_sha256", *_FLAGS, *_KEYS)
_DIGEST = re.compile("[0-9a-f]{64}", re.ASCII)


@dataclass(frozen=True, slots=True)
class Grant:
    """The permissions of one service. ``read`` and ``write`` list session keys.

    ``store`` gives full access: every verb on every session.
    """

    service: str
    store: bool = False
    verify: bool = False
    revoke: bool = False
    read: frozenset[str] = frozenset()
    write: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Grants:
    """The grants of a file, by the credentials of a service.

    ``anonymous``: for callers without credentials; only for a Unix socket, protected by its file
    mode.
    """

    by_certificate: Mapping[str, Grant] = field(default_factory=dict)
    by_token: Mapping[bytes, Grant] = field(default_factory=dict)
    anonymous: Grant | None = None

    def __repr__(self) -> str:
        """Hides the digests of tokens."""
        return "<Grants>"

    def of(self, names: list[str], token: str | None) -> Grant | None:
        """The grant of a caller with a certificate for ``names``, or with ``token``.

        If a caller has both, the certificate counts. None for an unknown caller.
        """
        for name in names:
            grant = self.by_certificate.get(name)
            if grant is not None:
                return grant
        if token is not None:
            return self.by_token.get(digest(token))
        return self.anonymous


class GrantsFile(ReplacedFiles[Grants]):
    """The grants in the file at ``path``, which is read again after it was replaced.

    Raises ``SettingError`` if it is unusable now. If it becomes unusable later, the old grants stay
    in force.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._first = True
        super().__init__((path,), self._grants, "Grants")

    def of(self, names: list[str], token: str | None) -> Grant | None:
        """Like ``Grants.of``. Checks the file's status."""
        self.renewed()
        return self.current.of(names, token)

    def _grants(self) -> Grants:
        first, self._first = self._first, False
        grants = read_grants(self._path)
        if not (first or grants.by_certificate or grants.by_token):
            raise SettingError(
                f"The grants file {self._path} names no service, perhaps because it is being "
                "written: rename a complete file into place. To grant nothing, name a service "
                "without permissions"
            )
        return grants


#: For a Unix socket without a grants file: its file mode protects it.
FULL_ACCESS = Grants(anonymous=Grant("the socket's user", store=True))


def digest(token: str) -> bytes:
    """The stored digest of a token. Tokens are random, so the timing of a lookup leaks nothing."""
    return hashlib.sha256(token.encode()).digest()


def read_grants(path: str) -> Grants:
    """The grants in a TOML file, one table for each service.

    Raises ``SettingError`` with the service and the allowed values.
    """
    try:
        tables = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise SettingError(
            f"The grants file {path} can't be read: {getattr(error, 'strerror', None) or error}"
        ) from None
    by_certificate: dict[str, Grant] = {}
    by_token: dict[bytes, Grant] = {}
    for service, table in tables.items():
        grant, certificate, token = _grant(path, service, table)
        if certificate is not None and by_certificate.setdefault(certificate, grant) is not grant:
            raise _wrong(path, service, "has the certificate of another service")
        if token is not None and by_token.setdefault(token, grant) is not grant:
            raise _wrong(path, service, "has the token of another service")
    return Grants(by_certificate, by_token)


def _grant(path: str, service: str, table: object) -> tuple[Grant, str | None, bytes | None]:
    if not isinstance(table, dict):
        raise _wrong(path, service, f"is outside of a table: begin one with [{service}]")
    for name in table.keys() - set(_FIELDS):
        raise _wrong(path, service, f"has {name!r}; allowed: {', '.join(_FIELDS)}")
    certificate, token = table.get("certificate"), table.get("token_sha256")
    if certificate is None and token is None:
        raise _wrong(
            path, service, "has neither certificate nor token_sha256, so no caller matches"
        )
    if certificate is not None and not (isinstance(certificate, str) and certificate):
        raise _wrong(
            path, service, "has a certificate that isn't a name such as 'billing.internal'"
        )
    if token is not None and not (isinstance(token, str) and _DIGEST.fullmatch(token)):
        raise _wrong(
            path, service, "has a token_sha256 that isn't 64 hexadecimal digits in lower case"
        )
    values: dict[str, Any] = {}
    for name in _FLAGS:
        values[name] = table.get(name, False)
        if type(values[name]) is not bool:
            raise _wrong(path, service, f"has {name} = {values[name]!r}; allowed: true, false")
    for name in _KEYS:
        keys = table.get(name, [])
        if not isinstance(keys, list) or not all(isinstance(key, str) and key for key in keys):
            raise _wrong(path, service, f"has a {name} that isn't a list of session keys")
        values[name] = frozenset(keys)
    return (
        Grant(service, **values),
        certificate,
        None if token is None else bytes.fromhex(token),
    )


def _wrong(path: str, service: str, why: str) -> SettingError:
    return SettingError(f"The grants file {path}: {service[:60]} {why}")
