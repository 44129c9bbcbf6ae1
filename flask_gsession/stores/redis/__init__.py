"""Sessions in Redis, Valkey or a Redis Cluster.

``store`` has the verbs, ``cluster`` what is different in a Cluster. ``pool``, ``servers`` and
``wakeup`` connect, ``scans`` goes through the keys, ``health`` is for the doctor.
"""

from .cluster import RedisClusterStore
from .store import RedisStore

__all__ = ["RedisClusterStore", "RedisStore"]
