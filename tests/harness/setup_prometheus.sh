#!/bin/sh
# Puts Debian's Prometheus into the folder $1 for tests/contrib/test_prometheus.py, where that needs no asking.
# Nothing is installed. Always succeeds: without it the tests say so themselves and the rest still runs.
folder=$1
command -v prometheus >/dev/null && command -v promtool >/dev/null && exit 0
[ -x "$folder/prometheus" ] && [ -x "$folder/promtool" ] && exit 0
command -v apt-get >/dev/null && command -v dpkg-deb >/dev/null || exit 0

echo "Fetching Prometheus for the tests of the metrics."
work=$(mktemp -d) && cd "$work" || exit 0
export DEBIAN_FRONTEND=noninteractive
fetch() { timeout 300 apt-get -q download prometheus; }
if ! {
    { fetch || { [ "$(id -u)" = 0 ] && timeout 120 apt-get -q update && fetch; }; } &&
    dpkg-deb --fsys-tarfile prometheus_*.deb | tar -x ./usr/bin/prometheus ./usr/bin/promtool &&
    mkdir -p "$folder" && mv usr/bin/promtool usr/bin/prometheus "$folder"
} >log 2>&1 </dev/null; then
    echo "Prometheus could not be had; apt-get said:"
    tail -n 5 log
fi
cd / && rm -rf "$work"
exit 0
