#!/bin/bash
# Installs what building, testing and demonstrating Lazurite need and this machine lacks. Debian and Ubuntu.
#
#   setup.sh [build] [test] [demo] [bench]      the first three if none is named
#
# Safe to run again: what is there is not touched, nothing is removed, no service is started or enabled.
set -euo pipefail

root=$(cd "$(dirname "$0")/.." && pwd)
PATH=$PATH:/usr/sbin:/sbin:$HOME/.cargo/bin

die() { printf 'setup.sh: error: %s\n' "$*" >&2; exit 1; }

# group, what must exist (a command, static:COMMAND for one without shared libraries, or a file), Debian package
NEEDS='
build   cc                          gcc
build   /usr/include/stdio.h        libc6-dev
build   protoc                      protobuf-compiler
test    containerd                  containerd
test    containerd-shim-runc-v2     containerd
test    ctr                         containerd
test    runc                        runc
test    docker-registry             docker-registry
test    ctr-remote                  stargz-snapshotter
test    skopeo                      skopeo
test    umoci                       umoci
test    podman                      podman
test    conmon                      conmon
test    crun                        crun
test    debootstrap                 debootstrap
test    xz                          xz-utils
test    gpgv                        gpgv
test    /usr/share/keyrings/debian-archive-keyring.gpg  debian-archive-keyring
test    static:busybox              busybox-static
test    python3                     python3
test    mount                       mount
test    unshare                     util-linux
bench   strace                      strace
bench   ip                          iproute2
bench   pip3                        python3-pip
'

groups=("$@")
[ ${#groups[@]} -gt 0 ] || groups=(build test demo)

wanted() {
    local group
    for group in "${groups[@]}"; do
        case $group in
        build | test | bench) [ "$1" != "$group" ] || return 0 ;;
        # The demonstration runs the same components as the system tests.
        demo) [ "$1" != test ] || return 0 ;;
        *) die "no group is called $group; there are build, test, demo and bench" ;;
        esac
    done
    return 1
}

present() {
    case $1 in
    /*) [ -e "$1" ] ;;
    # ldd fails for a program that needs no loader.
    static:*) command -v "${1#static:}" >/dev/null && ! ldd "$(command -v "${1#static:}")" >/dev/null 2>&1 ;;
    *) command -v "$1" >/dev/null ;;
    esac
}

# Lines of "thing package" that are still missing.
missing() {
    local group thing package
    while read -r group thing package; do
        if [ -n "$group" ] && wanted "$group" && ! present "$thing"; then echo "$thing $package"; fi
    done <<<"$NEEDS"
}

check_rust() {
    local least found hint
    least=$(sed -n 's/^rust-version = "\(.*\)"$/\1/p' "$root/Cargo.toml" | head -n 1)
    hint="get it from https://rustup.rs (curl --proto '=https' --tlsv1.2 -sSf https://sh.rustup.rs | sh)"
    command -v cargo >/dev/null || die "cargo is missing: Rust $least or newer is needed; $hint"
    found=$(cd "$root" && rustc --version | cut -d' ' -f2)
    [ "$(printf '%s\n' "$least" "$found" | sort -V | head -n 1)" = "$least" ] ||
        die "Rust $found is too old: $least or newer is needed; run 'rustup update stable', or $hint"
}

check_lint_tools() {
    local tool
    for tool in fmt clippy; do
        cargo "$tool" --version >/dev/null 2>&1 || die "cargo $tool is missing: rustup component add rustfmt clippy"
    done
}

as_root() { if [ "$(id -u)" = 0 ]; then "$@"; else sudo "$@"; fi; }

# A policy that forbids package scripts to start services while we install; an existing policy is left alone.
POLICY=/usr/sbin/policy-rc.d
install_packages() {
    local log
    log=$(mktemp)
    if [ ! -e "$POLICY" ]; then
        trap 'as_root rm -f "$POLICY"' EXIT
        printf '#!/bin/sh\nexit 101\n' | as_root tee "$POLICY" >/dev/null
        as_root chmod +x "$POLICY"
    fi
    apt_install "$@" >"$log" 2>&1 || { as_root apt-get update >>"$log" 2>&1 && apt_install "$@" >>"$log" 2>&1; } ||
        { grep -E '^E:' "$log" >&2 || tail -n 5 "$log" >&2; die "apt-get could not install: $*"; }
    rm -f "$log"
    # An enabled unit would start at the next boot.
    if command -v systemctl >/dev/null; then
        for package in "$@"; do
            case $package in
            containerd | docker-registry) disable "$package" ;;
            podman) disable podman.service podman.socket podman-restart.service \
                podman-auto-update.service podman-auto-update.timer ;;
            esac
        done
    fi
}

disable() { as_root systemctl disable --quiet "$@" 2>/dev/null || true; }

apt_install() {
    as_root env DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends --no-remove \
        -o DPkg::Lock::Timeout=120 "$@"
}

[ "$(uname -s)" = Linux ] || die "Lazurite runs on Linux, not on $(uname -s)"
wanted none || true # names an unknown group before anything is done
lacking=$(missing)
if [ -n "$lacking" ]; then
    mapfile -t packages <<<"$(cut -d" " -f2 <<<"$lacking" | sort -u)"
    command -v apt-get >/dev/null ||
        die "apt-get is missing; install by other means: $(cut -d' ' -f1 <<<"$lacking" | paste -sd' ')"
    [ "$(id -u)" = 0 ] || command -v sudo >/dev/null ||
        die "not root and no sudo; as root run: apt-get install ${packages[*]}"
    echo "installing ${packages[*]}"
    install_packages "${packages[@]}"
    lacking=$(missing)
    [ -z "$lacking" ] || die "still missing after installation: ${lacking//$'\n'/, }"
fi
if wanted build; then check_rust; fi
for group in "${groups[@]}"; do if [ "$group" = test ]; then check_lint_tools; fi; done
