#!/bin/sh
# Puts Debian's nginx and HAProxy, with the libraries they need, into the folder $1 for
# tests/sharing/test_proxies.py. Nothing is installed. Always succeeds: without them the tests say
# so themselves and the rest still runs.
folder=$1
command -v nginx >/dev/null && command -v haproxy >/dev/null && exit 0
[ -x "$folder/usr/sbin/nginx" ] && [ -x "$folder/usr/sbin/haproxy" ] && exit 0
command -v apt-get >/dev/null && command -v dpkg-deb >/dev/null || exit 0

echo "Fetching nginx and HAProxy for the tests of the pages that proxies ask."
work=$(mktemp -d) && cd "$work" || exit 0
export DEBIAN_FRONTEND=noninteractive
fetch() {
    timeout 300 apt-get -q download nginx haproxy liblua5.3-0 libopentracing-c-wrapper0 \
        libopentracing1 libpcre2-8-0
}
if ! {
    { fetch || { [ "$(id -u)" = 0 ] && timeout 120 apt-get -q update && fetch; }; } &&
    mkdir -p "$folder" && for package in *.deb; do dpkg-deb -x "$package" "$folder" || exit 1; done
} >log 2>&1 </dev/null; then
    echo "They could not be had; apt-get said:"
    tail -n 5 log
fi
cd / && rm -rf "$work"
exit 0
