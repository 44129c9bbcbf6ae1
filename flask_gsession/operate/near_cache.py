"""The check of the near cache for ``flask gsession doctor``."""

from __future__ import annotations

import time

from ..live.listener import now
from ..stores.parts import NEVER, Changes, Feed, Finding

_CHECK = "near cache"
_PATIENCE = 3.0  # seconds until the first proof must arrive
_LOOKS = 40
_ENOUGH = 0.9  # the required share of checks at which a record could be used
_ANY_KEY = "k" * 43


def check_near_cache(changes: Changes, bound: float) -> Finding:
    """Listen for a moment, and check whether a near cache with this bound would work.

    Takes three seconds at most, and one second if all is well.
    """
    feed = _proven(changes)
    if feed is None:
        why = changes.trouble or f"no proof of freshness within {_PATIENCE:g} s"
        return Finding("error", _CHECK, why, "Until this is fixed, every read asks the store.")
    ages = []
    for _ in range(_LOOKS):
        time.sleep(1 / _LOOKS)
        ages.append(now() - feed.exact_as_of)
    usable = sum(age < bound for age in ages) / _LOOKS
    found = f"records would be {1000 * max(ages):.0f} ms old at most"
    if usable < _ENOUGH:
        return Finding(
            "warning",
            _CHECK,
            f"{found}, so the cache works only {usable:.0%} of the time",
            f"SESSION_NEAR_CACHE is {bound:g} s: allow more, or find out why answers are late.",
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
