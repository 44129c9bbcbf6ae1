"""Warnings to the developer about settings."""

from __future__ import annotations

import sys
import warnings

from ..events import logger


def warn(message: str) -> None:
    """Issue a Python warning, and also log it if logging is set up.

    Without a log handler, Python would print the message a second time.
    """
    if logger.hasHandlers():
        logger.warning("%s", message)
    level = 2
    frame = sys._getframe(1)
    while frame.f_back and frame.f_globals.get("__name__", "").startswith("flask_gsession."):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)
