#!/bin/sh
# Puts npm's gRPC client into the folder $1 for tests/sharing/test_values.py, where there is Node.
# Always succeeds: without it the test says so itself and the rest still runs.
folder=$1
[ -d "$folder/node_modules/@grpc/grpc-js" ] && exit 0
command -v node >/dev/null && command -v npm >/dev/null || exit 0

echo "Fetching a gRPC client for Node for the tests."
mkdir -p "$folder" && cd "$folder" &&
timeout 300 npm install --silent --no-audit --no-fund '@grpc/grpc-js@^1.10' '@grpc/proto-loader@^0.7 || ^0.8' >log 2>&1 ||
    { echo "It could not be had; npm said:"; tail -n 5 log; }
exit 0
