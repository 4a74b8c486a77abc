# shellcheck shell=bash
# A private stand of real components under one directory: docker-registry, containerd, Lazurite. To be sourced.
#
#   stand_open DIR            makes DIR the stand; everything below is undone when the shell exits
#   stand_registry STORE      serves the storage directory STORE on loopback      -> REGISTRY, REGISTRY_LOG
#   stand_containerd NAME...  starts containerd with proxy plugins of these names -> CONTAINERD_ADDRESS (exported)
#   stand_lazurite NAME BINARY [OPTION...]   starts the daemon behind such a name; its data is in DIR/NAME
#   stand_namespace NAME      a containerd namespace of this stand                -> CONTAINERD_NAMESPACE (exported)
#   stand_pull_eagerly REF    pulls and unpacks with overlayfs, as any containerd would
#
# Nothing of the machine's own containerd is used or touched. What the shims leave outside DIR (their sockets and
# runc's state under /run/containerd, cgroups named after the namespace) is kept apart by the namespace's name.

say() { printf '%s\n' "$*" >&2; }
die() { printf '%s: error: %s\n' "${0##*/}" "$*" >&2; exit 1; }

# wait_until SECONDS WHAT COMMAND...: polls a condition; a deadline missed is an error that shows the log so far.
wait_until() {
    local deadline=$((SECONDS + $1)) what=$2 log
    shift 2
    until "$@" >/dev/null 2>&1; do
        if [ "$SECONDS" -ge "$deadline" ]; then
            for log in "$STAND"/*.log; do say "--- end of $log"; tail -n 5 "$log" | cut -c 1-500 >&2; done
            die "$what did not happen in time"
        fi
        sleep 0.05
    done
}

stand_open() {
    STAND=$1
    STAND_PIDS=()
    STAND_NAMESPACES=()
    STAND_RUN_IS_OURS=
    [ -e /run/containerd ] || STAND_RUN_IS_OURS=yes
    mkdir -p "$STAND"
    trap stand_close EXIT
    trap 'exit 130' INT
    trap 'exit 143' TERM
}

# stand_start NAME COMMAND...: runs a daemon with its output in NAME.log. It gets no terminal signals, so that Ctrl-C
# ends it in order through stand_close; it ends by itself should this shell be killed; it holds none of our locks (9).
stand_start() {
    local name=$1
    shift
    setsid setpriv --pdeathsig TERM "$@" >"$STAND/$name.log" 2>&1 </dev/null 9>&- &
    STAND_PIDS+=($!)
}

stand_registry() {
    REGISTRY_LOG=$STAND/registry.log
    mkdir -p "$1"
    cat >"$STAND/registry.yml" <<YAML
version: 0.1
log: {level: info, accesslog: {disabled: false}}
storage: {filesystem: {rootdirectory: $1}}
http: {addr: "127.0.0.1:0"}
YAML
    stand_start registry docker-registry serve "$STAND/registry.yml"
    wait_until 20 "docker-registry listening" grep -q 'listening on' "$REGISTRY_LOG"
    REGISTRY=$(grep -o 'listening on [0-9.:]*' "$REGISTRY_LOG" | cut -d' ' -f3)
}

# Bytes of all bodies the registry has sent so far: field 10 of its access log, which is in Apache's combined format.
registry_bytes() { awk '$6 == "\"GET" && $10 ~ /^[0-9]+$/ { sum += $10 } END { print sum + 0 }' "$REGISTRY_LOG"; }

# Content is not shared between namespaces, so that what one pull fetched spares another nothing.
stand_containerd() {
    local name
    export CONTAINERD_ADDRESS=$STAND/containerd.sock
    {
        cat <<TOML
version = 2
root = "$STAND/containerd/root"
state = "$STAND/containerd/state"
disabled_plugins = ["io.containerd.grpc.v1.cri"]
[grpc]
  address = "$CONTAINERD_ADDRESS"
[ttrpc]
  address = "$CONTAINERD_ADDRESS.ttrpc"
[plugins."io.containerd.metadata.v1.bolt"]
  content_sharing_policy = "isolated"
TOML
        for name in "$@"; do
            cat <<TOML
[proxy_plugins.$name]
  type = "snapshot"
  address = "$STAND/$name.sock"
  [proxy_plugins.$name.exports]
    root = "$STAND/$name"
TOML
        done
    } >"$STAND/containerd.toml"
    stand_start containerd containerd --config "$STAND/containerd.toml"
    wait_until 20 "containerd answering" ctr version
}

stand_lazurite() {
    local name=$1 binary=$2
    shift 2
    stand_start "$name" "$binary" serve --root "$STAND/$name" --address "$STAND/$name.sock" "$@"
    wait_until 20 "$name serving" grep -q serving "$STAND/$name.log"
}

stand_namespace() {
    export CONTAINERD_NAMESPACE=lazurite-$$-$1
    STAND_NAMESPACES+=("$CONTAINERD_NAMESPACE")
}

# ctr of containerd 2 pulls through the transfer service unless told otherwise; ctr of 1.x knows no other way.
stand_pull_eagerly() {
    local local_flag=()
    if ctr images pull --help | grep -q -- '--local'; then local_flag=(--local); fi
    ctr images pull "${local_flag[@]}" --plain-http --snapshotter overlayfs "$1" >"$STAND/pull.log" 2>&1 ||
        { tail -n 5 "$STAND/pull.log" >&2; die "cannot pull $1"; }
}

stand_stop_pid() {
    kill -TERM "$1" 2>/dev/null || return 0
    for _ in $(seq 200); do
        kill -0 "$1" 2>/dev/null || return 0
        sleep 0.05
    done
    kill -KILL "$1" 2>/dev/null || true
}

stand_mounts() { awk -v dir="$STAND/" 'index($5, dir) == 1 { print $5 }' /proc/self/mountinfo | tac; }

stand_close() {
    local status=$? namespace id mount
    trap - EXIT
    trap '' INT TERM
    set +e
    for namespace in "${STAND_NAMESPACES[@]}"; do
        for id in $(ctr -n "$namespace" tasks ls -q 2>/dev/null); do
            ctr -n "$namespace" tasks delete --force "$id" >/dev/null 2>&1
        done
    done
    for ((i = ${#STAND_PIDS[@]} - 1; i >= 0; i--)); do stand_stop_pid "${STAND_PIDS[i]}"; done
    wait
    # Should a mount have been left to it, nobody waits for a daemon any more.
    pkill -f "^lazurite-keep keep $STAND/" 2>/dev/null
    stand_mounts | while read -r mount; do timeout 20 umount --lazy "$mount"; done
    for namespace in "${STAND_NAMESPACES[@]}"; do
        rmdir "/run/containerd/runc/$namespace" 2>/dev/null
        find /sys/fs/cgroup -depth -type d -path "*/$namespace*" -exec rmdir {} + 2>/dev/null
    done
    if [ -n "$STAND_RUN_IS_OURS" ]; then find /run/containerd -depth -type d -exec rmdir {} + 2>/dev/null; fi
    rm -rf --one-file-system "$STAND"
    exit "$status"
}
