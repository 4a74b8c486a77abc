# shellcheck shell=bash
# Which Debian mirror packages come from. To be sourced.
DEFAULT_MIRROR=http://deb.debian.org/debian

# The mirror this machine already uses, in either of apt's formats; other archives do not end in /debian.
mirror() {
    local found
    found=$(cat /etc/apt/sources.list /etc/apt/sources.list.d/*.list /etc/apt/sources.list.d/*.sources 2>/dev/null |
        sed -nE 's/^(deb +(\[[^]]*\] +)?|URIs: *)(https?:\/\/[^ ]+\/debian)\/?( .*)?$/\3/p') || true
    found=${found%%$'\n'*}
    echo "${found:-$DEFAULT_MIRROR}"
}
