"""``flask gsession debug``."""

from __future__ import annotations

import re

import click
from flask.cli import with_appcontext

from ..errors import SessionConflict, SessionTooLarge, UnreadableRecord
from ..repository.debugging import debug_session
from .common import (
    HANDLE_ARGUMENT,
    NO_SESSION,
    choose_interface,
    format_time,
    report_failures,
    resolve_handle,
    session_option,
)

_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_LONGEST = 86400


class Span(click.ParamType[int]):
    """Parses durations such as 30s, 10m, 2h or 1d into seconds."""

    name = "duration"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> int:
        """Parse ``value``."""
        found = re.fullmatch(r"([0-9]{1,6})([smhd])", str(value))
        seconds = int(found[1]) * _SECONDS[found[2]] if found else 0
        if not 1 <= seconds <= _LONGEST:
            self.fail(
                f"{value!r} is not a duration; allowed: 1s to 1d, such as 30s, 10m or 2h",
                param,
                ctx,
            )
        return seconds


@click.command(
    context_settings=HANDLE_ARGUMENT,
    short_help="Log all requests of one session for a while.",
)
@click.argument("handle")
@click.option(
    "--for",
    "seconds",
    type=Span(),
    default="10m",
    show_default=True,
    help="How long: 30s, 10m, 2h, at most 1d.",
)
@click.option("--off", is_flag=True, help="Stop logging now.")
@session_option
@with_appcontext
def debug(handle: str, seconds: int, off: bool, cookie: str | None) -> None:
    """Log all requests of one session for a limited time.

    Each worker that serves a request of this session writes a debug dump to its log, on every
    machine. The dump shows values only for the keys in SESSION_DEBUG_SHOW. The session itself
    doesn't change.

    HANDLE may be its first eight or more characters if they are unique.
    """
    interface = choose_interface(cookie)
    repository = interface.repository
    with report_failures(interface):
        key = resolve_handle(interface, handle)
        end = repository.now() + seconds * 1000
        try:
            found = debug_session(repository, key, None if off else end)
        except (SessionConflict, SessionTooLarge, UnreadableRecord) as error:
            raise click.ClickException(f"{key}: could not change the session: {error}") from None
    if found is None:
        raise click.ClickException(f"{key}: {NO_SESSION}")
    now, before = found
    name = now if now == key else f"{now} (rotated from {key})"
    if not off:
        done = f"requests are logged until {format_time(end)}"
    elif before:
        done = "requests are no longer logged"
    else:
        done = "requests were not logged"
    click.echo(f"{name}: {done}")
