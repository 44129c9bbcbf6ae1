"""Steers running workers: a few numbers in a file that they all map."""

from __future__ import annotations

import mmap
import struct
from pathlib import Path

_CELLS = ("offset", "skew", "interrupts", "report")


class Control:
    """The numbers, by name; the same file is the same numbers in every process.

    `offset` and `skew`: seconds by which the clock of all workers, or of every other one, is wrong.
    `interrupts`: how many requests per second a worker interrupts inside the driver.
    `report`: a number that asks each worker to write down its state under that number.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.exists():
            path.write_bytes(bytes(8 * len(_CELLS)))
        with path.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), 0)

    def __getitem__(self, name: str) -> float:
        number: float = struct.unpack_from("d", self._map, 8 * _CELLS.index(name))[0]
        return number

    def __setitem__(self, name: str, value: float) -> None:
        struct.pack_into("d", self._map, 8 * _CELLS.index(name), value)
