#!/bin/sh
# Enrols once, then runs the agent. EBBFLOW_EDGE_TOKEN and EBBFLOW_EDGE_CLOUD are needed on the first start only; afterwards the
# identity is in the volume. With any argument it is `ebbflow-edge` itself: `podman exec agent edge-entrypoint status`.
set -eu
[ $# -eq 0 ] || exec ebbflow-edge "$@"
ebbflow-edge enrol --if-missing </dev/null
unset EBBFLOW_EDGE_TOKEN
exec ebbflow-edge run
