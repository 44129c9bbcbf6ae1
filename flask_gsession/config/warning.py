"""Warnings to the developer about settings."""

from __future__ import annotations

import sys
import warnings

from ..events import logger


def warn(message: str) -> None:
    """Warn the developer, and write to the log of a running server, if it has one.

    Without a handler, Python would print the log's message next to the warning.
    """
    if logger.hasHandlers():
        logger.warning("%s", message)
    level = 2
    frame = sys._getframe(1)
    while frame.f_back and frame.f_globals.get("__name__", "").startswith("flask_gsession."):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)
