#!/usr/bin/env bash
# Health of a worker: its runs can be written. Leaves nothing behind.
set -euo pipefail
probe="$(mktemp /opt/latentline/runs/.health-XXXXXXXX)"
trap 'rm -f -- "$probe"' EXIT
printf 'written\n' >"$probe"
