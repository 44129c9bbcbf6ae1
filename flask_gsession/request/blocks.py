"""Begins and leaves blocks: transactions and locks, whose changes are stored together."""

from __future__ import annotations

from typing import Literal

from ..events import logger
from .lifecycle import Lifecycle
from .rebasing import roll_back_values
from .state import Block, current_block


def begin_block(life: Lifecycle, kind: Literal["transaction", "lock"]) -> Block:
    """Begin a transaction or a lock, which gets all further changes. The caller holds the mutex."""
    pending = life.values.changes() if life.seen.record is None else None
    block = Block(kind, life.seen, life.wishes, life.block, pending)
    life.block = life.values.block = block
    return block


def leave_block(life: Lifecycle, block: Block) -> None:
    """Leave a block, which gets no further changes."""
    with life.mutex:
        inner = life.block
        if inner is block:
            life.block = life.values.block = block.outer
        while inner is not None:  # another thread may have begun a block inside this one
            if inner.outer is block:
                inner.outer = block.outer
            inner = inner.outer
    if current_block.get() is block:
        current_block.set(block.within)


def roll_back(life: Lifecycle, block: Block) -> None:
    """Discard the changes of a transaction or a lock, and leave it."""
    with life.mutex:
        life.wishes = block.before
        for key in roll_back_values(life.values, block):
            logger.error(
                "session[%a] was changed inside and outside a block that failed: both changes "
                "are lost",
                key[:60],
            )
        if life.seen.record is None and block.pending is not None:
            for key, change in block.pending.items():
                if change.mine is not None and key not in life.values:
                    life.values.set_encoded(key, change.mine, life.repository.now)
        leave_block(life, block)
