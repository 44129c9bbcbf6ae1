"""The clean-up that runs inside an application's processes."""

from .operate.cleanup import CleanupWorker

__all__ = ["CleanupWorker"]
