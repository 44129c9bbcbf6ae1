"""The check of the near cache for ``flask gsession doctor``."""

from __future__ import annotations

import time

from ..live.listener import now
from ..stores.parts import NEVER, Changes, Feed, Finding

_CHECK = "near cache"
_PATIENCE = 3.0  # seconds until something must be proven
_LOOKS = 40
_ENOUGH = 0.9  # of the looks at which a record could be used
_ANY_KEY = "k" * 43


def check_near_cache(changes: Changes, bound: float) -> Finding:
    """Listen for a moment, and see whether a near cache with this bound could be used.

    Takes three seconds at most, and a second if all is well.
    """
    feed = _proven(changes)
    if feed is None:
        why = changes.trouble or f"nothing was proven within {_PATIENCE:g} s"
        return Finding("error", _CHECK, why, "Until this is repaired, every read asks the store.")
    ages = []
    for _ in range(_LOOKS):
        time.sleep(1 / _LOOKS)
        ages.append(now() - feed.exact_as_of)
    usable = sum(age < bound for age in ages) / _LOOKS
    found = f"what is read would be {1000 * max(ages):.0f} ms old at most"
    if usable < _ENOUGH:
        return Finding(
            "warning",
            _CHECK,
            f"{found}, so that it can be used for {usable:.0%} of the time only",
            f"SESSION_NEAR_CACHE is {bound:g} s: allow more, or find out why answers come late.",
        )
    return Finding("ok", _CHECK, found)


def _proven(changes: Changes) -> Feed | None:
    changes.start()
    end = time.monotonic() + _PATIENCE
    while time.monotonic() < end:
        feed = changes.feed(_ANY_KEY)
        if feed is not None and feed.exact_as_of != NEVER:
            return feed
        time.sleep(0.01)
    return None
