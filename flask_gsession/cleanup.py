"""Clean-up: what nobody reads any more goes, in small steps."""

from __future__ import annotations

from collections.abc import Iterator

from .stores.base import MORE, Store, Sweeps, Tidied, Tidies


def has_leftovers(store: Store) -> bool:
    """Whether there is anything to be done at a store of this kind."""
    return isinstance(store, Tidies | Sweeps)


def steps(
    store: Store | Tidies, batch: int = 1000, cursor: str = "", *, dry_run: bool = False
) -> Iterator[Tidied]:
    """Clean ``store`` up, and give what each step found; a step looks at about ``batch`` things.

    Can be left after any step; ``cursor`` is that of the step to go on after.
    A store that only ``Sweeps`` cannot be asked what it would remove.
    """
    while isinstance(store, Tidies):
        step = store.tidy(cursor, batch, dry_run=dry_run)
        yield step
        cursor = step.cursor
        if not cursor:
            return
    while isinstance(store, Sweeps) and not dry_run:
        removed = store.sweep(batch)
        cursor = MORE if removed >= batch else ""
        yield Tidied({"expired sessions": removed}, removed, cursor)
        if not cursor:
            return
