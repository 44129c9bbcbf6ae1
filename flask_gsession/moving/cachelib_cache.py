"""Reads cachelib's storage format for Flask-Session, since cachelib itself would unpickle it.

A file holds its expiry in seconds (four bytes; 0: never), and a pickle. In Redis, an exclamation
mark precedes the pickle.
"""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Callable, Iterator
from typing import Any

from ..errors import StoreUnavailable, UnreadableRecord
from ..stores.base import Clock, milliseconds
from ..stores.foreign import Foreign, ForeignValues
from .pickles import MAX_BYTES

_EXPIRY = struct.Struct("I")
_HASHES: tuple[Callable[..., Any], ...] = (hashlib.sha256, hashlib.md5)


class CacheFiles(ForeignValues):
    """The files of a ``FileSystemCache`` in ``folder``, each named by the hash of its key.

    ``hash_method``: the cache's. Without it, tries SHA-256, then MD5, which cachelib used before
    0.14.
    """

    def __init__(
        self, folder: str, clock: Clock, hash_method: Callable[[bytes], Any] | None = None
    ) -> None:
        self._folder = folder
        self._clock = clock
        self._hashes = _HASHES if hash_method is None else (hash_method,)

    def load(self, name: str) -> Foreign | None:
        for path in self._paths(name):
            try:
                with open(path, "rb") as file:
                    stored = file.read(MAX_BYTES + _EXPIRY.size + 1)
            except FileNotFoundError:
                continue
            except OSError as error:
                raise _failed("load", error) from None
            if len(stored) < _EXPIRY.size:
                raise UnreadableRecord("corrupt", "truncated file")
            end = _EXPIRY.unpack(stored[: _EXPIRY.size])[0] * 1000
            if 0 < end <= milliseconds(self._clock):
                continue
            return Foreign(stored[_EXPIRY.size :], end or None)
        return None

    def delete(self, name: str) -> None:
        for path in self._paths(name):
            try:
                os.remove(path)
            except FileNotFoundError:
                continue
            except OSError as error:
                raise _failed("delete", error) from None

    def names(self, prefix: str) -> Iterator[str]:
        raise NotImplementedError("the files are named by hashes, so their sessions are unknown")

    def _paths(self, name: str) -> list[str]:
        key = name.encode()
        return [os.path.join(self._folder, hash_(key).hexdigest()) for hash_ in self._hashes]


class CacheStrings(ForeignValues):
    """The strings of a ``RedisCache``, which has its own ``prefix``."""

    def __init__(self, strings: ForeignValues, prefix: str) -> None:
        self._strings = strings
        self._prefix = prefix

    def load(self, name: str) -> Foreign | None:
        found = self._strings.load(self._prefix + name)
        if found is None:
            return None
        if found.value[:1] != b"!":
            raise UnreadableRecord("corrupt", "not a pickle of cachelib")
        return found._replace(value=found.value[1:])

    def delete(self, name: str) -> None:
        self._strings.delete(self._prefix + name)

    def names(self, prefix: str) -> Iterator[str]:
        for name in self._strings.names(self._prefix + prefix):
            yield name.removeprefix(self._prefix)


def _failed(operation: str, error: OSError) -> StoreUnavailable:
    return StoreUnavailable(f"filesystem: {operation}: {error.strerror or type(error).__name__}")
