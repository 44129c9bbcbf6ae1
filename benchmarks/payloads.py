"""The contents of the benchmarked sessions: lists of lines, and one small key that is used."""

from __future__ import annotations

import random
import string

SIZES = {"200 B": 200, "2 KB": 2_000, "20 KB": 20_000, "200 KB": 200_000}
"""Label -> bytes of keys and values together, without the small key."""

BROWSER_COOKIE_LIMIT = 4_093
"""Bytes of one cookie that browsers keep. A session larger than that cannot live in a cookie."""

_LINE_BYTES = 54
_KEY_BYTES = 9
"""Bytes of one line and of one key as MessagePack encodes them, about."""

_MOST_KEYS = 12
"""A session has few keys; what makes it large stands inside them."""


def content(size: int) -> dict[str, list[dict[str, object]]]:
    """Returns lists of order lines under a few keys, about `size` bytes when encoded.

    Real sessions have a cart, recently viewed products, and the steps of a form. The lines are
    pseudo-random from a fixed seed, the same on every run.
    """
    choice = random.Random(size)
    keys = min(_MOST_KEYS, size // (_LINE_BYTES + _KEY_BYTES))
    lines = round((size - keys * _KEY_BYTES) / _LINE_BYTES)
    filled: dict[str, list[dict[str, object]]] = {f"list{number:02d}": [] for number in range(keys)}
    for number in range(lines):
        filled[f"list{number % keys:02d}"].append(_line(choice))
    return filled


def _line(choice: random.Random) -> dict[str, object]:
    return {
        "sku": "".join(choice.choices(string.ascii_uppercase + string.digits, k=8)),
        "name": "".join(choice.choices(string.ascii_lowercase, k=16)),
        "quantity": choice.randint(1, 9),
        "price": choice.randint(100, 99_999),
    }
