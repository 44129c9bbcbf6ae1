"""Unpickles old sessions in a separate process, which ``pickle_process`` starts.

Only well-known classes of plain values are allowed. Each pickle is loaded in a fork with limits on
memory and time, which can't open files and ends afterwards, so one pickle can't affect the next.

Reads pickles from standard input and writes an ``Answer`` for each to standard output. Each is
preceded by its length in four bytes.
"""

from __future__ import annotations

import codecs
import io
import os
import pickle
import signal
import struct
import sys
from collections import Counter, OrderedDict, defaultdict
from contextlib import suppress
from datetime import date, datetime, time, timedelta, timezone
from decimal import Decimal
from typing import Any, BinaryIO
from uuid import UUID

import msgspec
from markupsafe import Markup

from ..errors import ValueRefused
from ..values.codec import Codec, is_valid_text
from ..values.damage import DEEPEST
from .pickle_process import LENGTH, MAX_ANSWER, Answer
from .pickles import RefusedPickle, check_extent

_MEMORY = 1 << 30  # bytes
_CPU_TIME, _TIME = 5, 10  # seconds

_OUT_OF_MEMORY = 3
_REASONS = {
    _OUT_OF_MEMORY: "needs too much memory",
    **{
        -getattr(signal, name): "takes too long"
        for name in ("SIGXCPU", "SIGALRM", "SIGKILL")  # SIGKILL comes at the hard CPU limit
        if hasattr(signal, name)  # not on Windows
    },
}

_encode = msgspec.msgpack.Encoder().encode


def _latin1(text: str, encoding: str) -> bytes:
    """``codecs.encode``, as far as pickles of protocol 2 use it for bytes."""
    if encoding != "latin1":
        raise RefusedPickle("names _codecs.encode")
    return codecs.latin_1_encode(text)[0]


_CLASSES = (
    *(date, datetime, time, timedelta, timezone, Decimal, UUID, Markup),
    *(Counter, OrderedDict, defaultdict),
    *(set, frozenset, bytearray, dict, list, tuple, int, float, str, bool),
)
_ALLOWED: dict[tuple[str, str], Any] = {
    ("_codecs", "encode"): _latin1,
    **{(each.__module__, each.__name__): each for each in _CLASSES},
    # as protocol 2 names them
    **{("__builtin__", each.__name__): each for each in _CLASSES if each.__module__ == "builtins"},
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ALLOWED[module, name]
        except KeyError:
            raise RefusedPickle("names " + ascii(f"{module}.{name}")[1:60].rstrip("'")) from None


def answer(pickled: bytes) -> Answer:
    """Load a pickle, and encode its values one by one."""
    try:
        contents = _Unpickler(io.BytesIO(pickled)).load()
        check_extent(contents)
        if not isinstance(contents, dict):
            raise RefusedPickle("not a dict")
    except RefusedPickle as error:
        return Answer(str(error))
    except MemoryError:
        raise
    except Exception:  # anything can happen; the error's text may hold values
        return Answer("malformed")
    codec = Codec(DEEPEST)
    values, dropped = {}, []
    for key, value in contents.items():
        if type(key) is str and is_valid_text(key):
            with suppress(ValueRefused, RefusedPickle):
                values[key] = codec.encode(key, _plain(value))
                continue
        dropped.append(ascii(key)[:60])
    return Answer("", values, dropped)


def _plain(value: Any) -> Any:
    """The value in types that a session keeps."""
    if isinstance(value, (dict, set, frozenset)):
        for key in value:  # as for other pickles
            if isinstance(key, int) and key.bit_length() > 64:
                raise RefusedPickle("an int beyond 64 bits as a key or in a set")
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, bytearray):
        return bytes(value)
    if type(value) in (list, tuple):
        return type(value)(_plain(item) for item in value)
    return value


def _answer_in_fork(pickled: bytes) -> bytes:
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        _answer_and_exit(pickled, reading, writing)
    os.close(writing)
    with open(reading, "rb") as pipe:
        answered = pipe.read(MAX_ANSWER + 1)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status == 0 and len(answered) <= MAX_ANSWER:
        return answered
    return _encode(Answer(_REASONS.get(status, "can't be loaded")))


def _answer_and_exit(pickled: bytes, reading: int, writing: int) -> None:
    import resource  # not on Windows

    try:
        os.close(reading)
        signal.alarm(_TIME)
        limits = [(resource.RLIMIT_CPU, _CPU_TIME), (resource.RLIMIT_AS, _MEMORY)]
        limits += [(resource.RLIMIT_NOFILE, 0), (resource.RLIMIT_FSIZE, 0)]
        limits += [(resource.RLIMIT_NPROC, 0), (resource.RLIMIT_CORE, 0)]
        for limit, most in limits:
            with suppress(
                ValueError, OSError
            ):  # it is lower already, or the system doesn't know it
                resource.setrlimit(limit, (most, most))
        rest = _encode(answer(pickled))
        while rest:
            rest = rest[os.write(writing, rest) :]
        os._exit(0)
    except MemoryError:
        os._exit(_OUT_OF_MEMORY)
    finally:
        os._exit(1)


def _read(source: BinaryIO, length: int) -> bytes | None:
    data = source.read(length)
    return data if len(data) == length else None


def main() -> None:
    """Answer until standard input ends."""
    source, out = sys.stdin.buffer, sys.stdout.buffer
    answer(
        pickle.dumps({"all": [Decimal(1), UUID(int=1), datetime.now()]})
    )  # to import modules before the limits apply
    length = struct.Struct(LENGTH)
    while (head := _read(source, length.size)) is not None:
        pickled = _read(source, length.unpack(head)[0])
        if pickled is None:
            return
        answered = _answer_in_fork(pickled)
        out.write(length.pack(len(answered)) + answered)
        out.flush()


if __name__ == "__main__":
    main()
