"""Sessions in Redis, Valkey or a Redis Cluster.

``store`` puts a store together, ``records`` has its verbs, and ``cluster`` the differences in a
Cluster. ``pool``, ``servers`` and ``wakeup`` connect, ``scans`` iterates over the keys, and
``health`` has the doctor's checks. ``driver`` handles the differences between versions of redis-py,
and refuses versions that don't work.
"""

from . import driver  # noqa: F401  # first: the other modules import names that old versions lack
from .cluster import RedisClusterStore
from .store import RedisStore

__all__ = ["RedisClusterStore", "RedisStore"]
