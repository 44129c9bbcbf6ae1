#!/bin/sh
# Brings Debian's chromium for tests/examples/test_shop_browser.py where that can be done without asking anyone.
# Always succeeds: without a browser the browser test says so itself and the rest still runs.
command -v chromium >/dev/null && exit 0
[ "$(id -u)" = 0 ] && command -v apt-get >/dev/null || exit 0

echo "Installing chromium for the browser test."
log=$(mktemp)
export DEBIAN_FRONTEND=noninteractive
if ! { timeout 120 apt-get -q update && timeout 600 apt-get -qy install --no-install-recommends chromium
} >"$log" 2>&1 </dev/null; then
    echo "chromium could not be installed; apt-get said:"
    tail -n 5 "$log"
fi
rm -f "$log"
exit 0
