"""For tests: a clock to turn, a store that misbehaves on demand, and the store contract.

Run the contract on a store of your own with pytest::

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
    # Tests of an application need a clock, not the contract of stores.
    if name == "StoreContract":
        from .contract import StoreContract

        return StoreContract
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
