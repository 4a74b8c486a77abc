#!/bin/bash
# Measures Lazurite beside containerd's overlayfs in one run, with real components, and writes bench/results.md,
# bench/results.json and bench/results.svg.
#
#   bench.sh BINARY [--quick] [--runs N] [--peer NAME=SOCKET] [--workload W]... [--link L]... [SECTION...]
#
# Sections: start, warm, attach, fill, convert; all if none is named. The images are built once, which takes a while. What
# is measured and how is in the modules of bench/, beginning with bench/__main__.py. Needs root.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
[ "$(id -u)" = 0 ] || exec sudo --preserve-env=LAZURITE_CACHE "$0" "$@"
PATH=$PATH:/usr/sbin:/sbin
exec python3 -B "$here/bench" "$@"
