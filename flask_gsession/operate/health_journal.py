"""Checks of the journal: whether a process sweeps, and whether consumers keep up."""

from __future__ import annotations

from collections.abc import Iterator

from ..errors import StoreUnavailable
from ..repository.repository import Repository
from ..stores.parts import Finding

_CHECK = "journal"
_LATE = 600_000  # milliseconds that an expired session may wait
_SWEEP = (
    "Keep a consumer running (flask gsession events --consumer NAME --follow), use a "
    "CleanupWorker, or run flask gsession cleanup from cron."
)


def check_journal(repository: Repository) -> list[Finding]:
    """Findings about the journal; empty if it is off. Doesn't raise in an outage."""
    if repository.journaling is None:
        return []
    try:
        return list(_findings(repository)) or [Finding("ok", _CHECK)]
    except StoreUnavailable as error:  # or the user lacks a right that only the journal needs
        return [Finding("error", _CHECK, f"it can't be read: {error}", "Consumers get no events.")]


def _findings(repository: Repository) -> Iterator[Finding]:
    figures = repository.journaling.journal.figures()
    if figures.due and figures.oldest_due < repository.now() - _LATE:
        minutes = (repository.now() - figures.oldest_due) // 60_000
        waiting = f"{figures.due} expired sessions wait for their event, for up to {minutes} min"
        yield Finding("warning", _CHECK, waiting, _SWEEP)
    if not figures.consumers:
        yield Finding("warning", _CHECK, "no consumer has read it yet", _SWEEP)
    for name, number in sorted(figures.consumers.items()):
        behind, kept = figures.last - number, figures.last - figures.first + 1
        if number < figures.first - 1:
            missed = f"the consumer {name} has missed {figures.first - 1 - number} events"
            advice = (
                "Run it more often, raise SESSION_JOURNAL_EVENTS, or remove it: "
                f"flask gsession events --consumer {name} --forget"
            )
            yield Finding("warning", _CHECK, missed, advice)
        elif 2 * behind > repository.settings.journal_events and behind <= kept:
            late = f"the consumer {name} is {behind} events behind"
            yield Finding("warning", _CHECK, late, "It will miss events soon: is it running?")
