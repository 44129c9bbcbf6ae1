"""The stores of the benchmarks: three ways to use each, and a meter on its server."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from flask import Flask

from benchmarks.measure import Call


@dataclass(frozen=True)
class Traffic:
    """The cost of one request by the server's own statistics.

    `round_trips` counts the clients' commands; `commands` also counts those that scripts ran inside
    the server. Bytes are seen from the server: `received` from us, `sent` to us.
    """

    round_trips: float
    commands: dict[str, float] = field(default_factory=dict)
    received: float | None = None
    sent: float | None = None


class Bare(Protocol):
    """The floor: the commands our store sends, sent by the bare driver."""

    def read(self) -> object: ...

    def write(self) -> object: ...


class Backend(Protocol):
    """A fresh place in one store, for sessions of one size. `close` clears it away."""

    def flask_session(self, app: Flask) -> None:
        """Installs Flask-Session in its default settings."""

    def ours(self, app: Flask) -> None:
        """Installs Flask-GSession in its default settings."""

    def floor(self) -> Bare:
        """Copies the one session stored by ours so far, for bare commands to work on."""

    def traffic(self, call: Call, times: int) -> Traffic:
        """Runs `call` that many times and returns the average cost of one."""

    def versions(self) -> dict[str, str]:
        """Versions of the server and the driver."""

    def close(self) -> None: ...
