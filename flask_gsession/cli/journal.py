"""``flask gsession events``."""

from __future__ import annotations

import json
import os
import signal
import stat
import sys
from contextlib import suppress
from io import UnsupportedOperation
from typing import Any

import click
from flask.cli import with_appcontext

from ..interface import GSessionInterface
from ..journal.consuming import Consumer, JournalEvent, check_consumer
from ..journal.entries import as_line
from .common import (
    choose_interface,
    format_time,
    json_option,
    print_store,
    report_failures,
    session_name,
    session_option,
)

_COLUMNS = ("handle", "owner", "device", "reason", "by", "previous", "missed")


@click.command(short_help="Print the events of the journal.")
@click.option("--consumer", metavar="NAME", help="Continue where this consumer left off.")
@click.option("--follow", is_flag=True, help="Wait for more events instead of ending.")
@click.option("--no-ack", is_flag=True, help="Print the events, but don't acknowledge them.")
@click.option("--forget", is_flag=True, help="Forget how far the consumer has read.")
@session_option
@json_option
@with_appcontext
def events(
    consumer: str | None,
    follow: bool,
    no_ack: bool,
    forget: bool,
    cookie: str | None,
    as_json: bool,
) -> None:
    """Print the journal's events that this consumer has not acknowledged yet.

    Prints one event per line, and acknowledges events once it has written them to standard output.
    After a crash, it may print some again. Also adds expired sessions to the journal.

    With --follow, waits if it can't reach the store, and ends on SIGTERM and Ctrl-C, after it has
    acknowledged the events that it printed.

    Without --consumer, shows the state of the journal and of its consumers.
    """
    interface = choose_interface(cookie)
    if interface.repository.journaling is None:
        raise click.ClickException(
            f"{session_name(interface)}: SESSION_JOURNAL is off: set it to True"
        )
    if consumer is None:
        if follow or no_ack or forget:
            raise click.UsageError("--follow, --no-ack and --forget need --consumer")
        _show_state(interface, as_json)
        return
    try:
        check_consumer(consumer)
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    print_store(interface)
    with report_failures(interface):
        if forget:
            if not interface.repository.journaling.journal.forget(consumer):
                raise click.ClickException(f"there is no consumer {consumer}")
            click.echo(f"{consumer}: forgotten")
            return
        _print(interface, consumer, follow, no_ack, as_json)


def _print(
    interface: GSessionInterface, name: str, follow: bool, no_ack: bool, as_json: bool
) -> None:
    repository = interface.repository
    consumer = Consumer(repository.journaling, repository.clock, name, follow=follow)
    if follow:
        _stop_by_signal(consumer)
    for batch in consumer.batches():
        for event in batch:
            click.echo(as_line(event.as_dict()) if as_json else _line(event))
        _flush()
        if not no_ack:
            batch[-1].ack()


def _flush() -> None:
    """Flush the output. If it is a file, sync it, so that it survives a power cut."""
    sys.stdout.flush()
    with suppress(UnsupportedOperation):  # not a real file
        file = sys.stdout.fileno()
        if stat.S_ISREG(os.fstat(file).st_mode):
            os.fsync(file)


def _stop_by_signal(consumer: Consumer) -> None:
    """Let the first signal stop the consumer cleanly, and the second one end it immediately."""

    def stop(*_: object) -> None:
        consumer.stop()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)


def _line(event: JournalEvent) -> str:
    fields = event.as_dict()
    shown = (f"{name}={json.dumps(fields[name])}" for name in _COLUMNS if name in fields)
    return " ".join([fields["time"], event.kind, *shown])


def _show_state(interface: GSessionInterface, as_json: bool) -> None:
    print_store(interface)
    with report_failures(interface):
        figures = interface.repository.journaling.journal.figures()
    kept = figures.last - figures.first + 1 if figures.last else 0
    state: dict[str, Any] = {
        "kept": kept,
        "first": figures.first,
        "last": figures.last,
        "expired_waiting": figures.due,
        "oldest_waiting": format_time(figures.oldest_due) if figures.due else None,
        "consumers": {
            name: {"acknowledged": number, "behind": max(0, figures.last - number)}
            for name, number in sorted(figures.consumers.items())
        },
    }
    if as_json:
        click.echo(json.dumps(state, indent=2))
        return
    click.echo(f"{kept} events are kept, {figures.first} to {figures.last}")
    click.echo(f"{figures.due} expired sessions wait for their event")
    for name, consumer in state["consumers"].items():
        click.echo(
            f"consumer {name}: acknowledged {consumer['acknowledged']}, "
            f"{consumer['behind']} events behind"
        )
