"""``flask gsession debug``."""

from __future__ import annotations

import re

import click
from flask.cli import with_appcontext

from ..errors import SessionConflict, SessionTooLarge, UnreadableRecord
from .common import NO_SESSION, chosen, key_of, moment, session_option, told

_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_LONGEST = 86400


class Span(click.ParamType[int]):
    """A time as people write it, in seconds: 30s, 10m, 2h, 1d."""

    name = "time"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> int:
        """The seconds in ``value``."""
        found = re.fullmatch(r"([0-9]{1,6})([smhd])", str(value))
        seconds = int(found[1]) * _SECONDS[found[2]] if found else 0
        if not 1 <= seconds <= _LONGEST:
            self.fail(f"{value!r} is no time from 1s to 1d, as 30s, 10m or 2h.", param, ctx)
        return seconds


# A handle may begin with a hyphen.
@click.command(
    context_settings={"ignore_unknown_options": True},
    short_help="Log what requests do with one session for a while.",
)
@click.argument("handle")
@click.option(
    "--for",
    "span",
    type=Span(),
    default="10m",
    show_default=True,
    help="For how long: 30s, 2h, at most 1d.",
)
@click.option("--off", is_flag=True, help="End it now.")
@session_option
@with_appcontext
def debug(handle: str, span: int, off: bool, cookie: str | None) -> None:
    """Log what requests do with one session, for a limited time.

    Each request of that session writes its dump to the log of the worker that serves it, in every
    process and on every machine. Of values only those of SESSION_DEBUG_SHOW are shown. The session
    itself stays as it is.

    Of HANDLE the first eight or more characters are enough, where no other begins with them.
    """
    interface = chosen(cookie)
    repository = interface.repository
    with told(interface):
        key = key_of(interface, handle)
        end = repository.now() + span * 1000
        try:
            found = repository.debug(key, None if off else end)
        except (SessionConflict, SessionTooLarge, UnreadableRecord) as error:
            raise click.ClickException(f"{key}: not done: {error}") from None
    if found is None:
        raise click.ClickException(f"{key}: {NO_SESSION}")
    now, before = found
    name = now if now == key else f"{now} (rotated from {key})"
    if not off:
        done = f"requests are logged until {moment(end)}"
    elif before:
        done = "requests are no longer logged"
    else:
        done = "requests were not logged"
    click.echo(f"{name}: {done}")
