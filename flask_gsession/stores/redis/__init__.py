"""Sessions in Redis, Valkey or a Redis Cluster.

``store`` has the verbs, ``cluster`` the differences in a Cluster. ``pool``, ``servers`` and
``wakeup`` connect, ``scans`` goes through the keys, ``health`` is for the doctor. ``driver`` knows
the differences between the versions of redis-py, and refuses versions that don't work.
"""

from . import driver  # noqa: F401  # first: refuses versions of redis-py that lack names which the other modules import
from .cluster import RedisClusterStore
from .store import RedisStore

__all__ = ["RedisClusterStore", "RedisStore"]
