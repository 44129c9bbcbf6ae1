"""Reads the contents of an old session, in any serialisation that Flask-Session has used."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from .map_keys import excess_in
from .pickles import RefusedPickle, check_extent, read_pickle

_DECODERS = (msgspec.msgpack.decode, msgspec.json.decode)
_NO_DATA = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)


class RefusedContents(Exception):
    """The stored bytes are malformed or unsafe to read. The message holds no values."""


def read_contents(stored: bytes) -> Mapping[Any, Any]:
    """The keys and values of a session: MessagePack or JSON (0.7 and newer), or a pickle.

    Tries them in the order of Flask-Session 0.8, which still reads the pickles of older versions.
    Raises ``RefusedContents``.
    """
    if excess := excess_in(stored):
        raise RefusedContents(excess)
    for decode in _DECODERS:
        try:
            return _checked(decode(stored))
        except _NO_DATA:
            continue
    return read_pickled(stored)


def read_pickled(stored: bytes) -> Mapping[Any, Any]:
    """Like ``read_contents``, for a pickle. Raises ``RefusedContents``."""
    try:
        return _checked(read_pickle(stored))
    except RefusedPickle as error:
        raise RefusedContents(f"pickle: {error}") from None


def _checked(contents: Any) -> Mapping[Any, Any]:
    if not isinstance(contents, dict):
        raise RefusedContents(f"a {type(contents).__name__} instead of a dict")
    try:
        check_extent(contents)
    except RefusedPickle as error:
        raise RefusedContents(str(error)) from None
    return contents
