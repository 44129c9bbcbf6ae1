"""Lets a separate process, ``unpickling``, read the pickles that name classes.

Neither side unpickles data from the other: values are in our own codec's encoding.
"""

from __future__ import annotations

import os
import select
import signal
import struct
import subprocess
import sys
import time
from contextlib import suppress
from types import TracebackType
from typing import Any, Self

import msgspec

from ..errors import SettingError, UnreadableRecord
from ..repository.repository import Repository
from .contents import RefusedContents
from .pickles import MAX_BYTES
from .source import Contents, encoded

LENGTH = ">I"
MAX_ANSWER = 64 * 1024 * 1024  # bytes
_TIME = 30.0  # seconds for one pickle; the process itself gives up earlier


class Answer(msgspec.Struct, array_like=True):
    """The contents of a pickle. ``refused`` says why it was not loaded."""

    refused: str
    values: dict[str, bytes] = {}
    dropped: list[str] = []

    def __repr__(self) -> str:
        return f"<Answer: {len(self.values)} keys>"

    def __rich_repr__(self) -> list[tuple[str, Any]]:
        return [("refused", self.refused)]


_decode = msgspec.msgpack.Decoder(Answer).decode


class PickleProcess:
    """The process, started at first use. A context manager, which ends the process.

    Raises ``SettingError`` on systems without resource limits, such as Windows.
    """

    def __init__(self) -> None:
        if not hasattr(os, "fork"):
            raise SettingError("--pickle needs a system with fork and resource limits, not Windows")
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stop()

    def contents(self, repository: Repository, pickled: bytes) -> Contents:
        """The values of a pickled session, encoded. Raises ``RefusedContents``."""
        try:
            answer = _decode(self._ask(pickled))
            if answer.refused:
                raise RefusedContents(f"pickle: {answer.refused}")
            values = {key: repository.codec.decode(raw) for key, raw in answer.values.items()}
        except (OSError, EOFError, msgspec.DecodeError, UnreadableRecord):
            self._stop()
            raise RefusedContents("pickle: the process that reads it failed") from None
        except BaseException:
            if self._unanswered:
                self._stop()  # otherwise its answer would count as the next one's
            raise
        contents = encoded(repository, values)
        return contents._replace(dropped=(*answer.dropped, *contents.dropped))

    _unanswered = False

    def _ask(self, pickled: bytes) -> bytes:
        if len(pickled) > MAX_BYTES:
            raise RefusedContents(f"pickle: more than {MAX_BYTES} bytes")
        process = self._process = self._process or _started()
        assert process.stdin is not None
        self._unanswered = True
        end = time.monotonic() + _TIME
        process.stdin.write(struct.pack(LENGTH, len(pickled)) + pickled)
        process.stdin.flush()
        (length,) = struct.unpack(LENGTH, _read(process, struct.calcsize(LENGTH), end))
        if length > MAX_ANSWER:
            raise EOFError
        answer = _read(process, length, end)
        self._unanswered = False
        return answer

    def _stop(self) -> None:
        process, self._process = self._process, None
        self._unanswered = False
        if process is None:
            return
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # with its forks, which are in its process group
        process.wait()
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None
            with suppress(OSError):
                pipe.close()


def _started() -> subprocess.Popen[bytes]:
    path = os.pathsep.join(os.path.abspath(each) for each in sys.path)
    return subprocess.Popen(
        [sys.executable, "-P", "-s", "-m", "flask_gsession.moving.unpickling"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={"PYTHONPATH": path},  # nothing else, to keep secrets out
        start_new_session=True,
    )


def _read(process: subprocess.Popen[bytes], length: int, end: float) -> bytes:
    assert process.stdout is not None
    data = b""
    descriptor = process.stdout.fileno()
    while len(data) < length:
        ready, _, _ = select.select([descriptor], [], [], max(0.0, end - time.monotonic()))
        part = os.read(descriptor, length - len(data)) if ready else b""
        if not part:
            raise EOFError
        data += part
    return data
