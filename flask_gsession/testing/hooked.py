"""A store that fails on demand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..stores.base import Deleted, Replaced, Store
from ..stores.wrappers import CallWrapper


class HookedStore(CallWrapper):
    """A wrapper that runs your hooks before and after calls of ``store``.

    ``calls`` lists the operations in order. A hook is called once, without arguments. If it raises,
    the call fails; a hook after the call runs when the store has made the change. If a hook after a
    call returns a ``Deleted`` or ``Replaced``, that replaces the result.
    """

    def __init__(self, store: Store) -> None:
        super().__init__(store, self._around)
        self.calls: list[str] = []
        self._hooks: dict[tuple[str, str], list[Callable[[], object]]] = {}

    def before(self, operation: str, hook: Callable[[], object]) -> None:
        """Run ``hook`` once, before the next call of ``operation``."""
        self._hooks.setdefault(("before", operation), []).append(hook)

    def after(self, operation: str, hook: Callable[[], object]) -> None:
        """Run ``hook`` once, after the next call of ``operation``."""
        self._hooks.setdefault(("after", operation), []).append(hook)

    def _around(self, operation: str, method: Callable[..., Any], *arguments: Any) -> Any:
        self.calls.append(operation)
        self._run("before", operation)
        answer = method(*arguments)
        other = self._run("after", operation)
        return other if isinstance(other, Deleted | Replaced) else answer

    def _run(self, when: str, operation: str) -> object:
        try:
            hook = self._hooks[when, operation].pop(0)
        except (KeyError, IndexError):  # no hook, or another thread took it
            return None
        return hook()
