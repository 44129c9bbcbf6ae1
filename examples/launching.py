"""Starts the processes of an example, and ends them together."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence


def run_flask(commands: Sequence[tuple[Sequence[str], Mapping[str, str]]], said: str) -> None:
    """Run ``flask`` once for each command, with its own environment variables, and print ``said``.

    Returns when a process has ended, or this one is interrupted; then all of them have ended.
    """
    processes = [
        subprocess.Popen([sys.executable, "-m", "flask", *command], env={**os.environ, **own})
        for command, own in commands
    ]
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    print(said, flush=True)
    try:
        while all(process.poll() is None for process in processes):
            time.sleep(0.1)
    except KeyboardInterrupt:
        pass
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait()
