"""For tests: a clock you control, a store that fails on demand, and the store contract.

Run the contract on your own store with pytest::

    from flask_gsession.testing import StoreContract

    class TestMyStore(StoreContract):
        def open(self, clock):
            return MyStore(clock=clock)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .clock import FakeClock
from .hooked import HookedStore
from .records import a_blob, a_pointer, a_record

if TYPE_CHECKING:
    from .contract import StoreContract

__all__ = ["FakeClock", "HookedStore", "StoreContract", "a_blob", "a_pointer", "a_record"]


def __getattr__(name: str) -> Any:
    # Tests of an application need a clock, and shouldn't import the contract.
    if name == "StoreContract":
        from .contract import StoreContract

        return StoreContract
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
