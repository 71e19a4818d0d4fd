# A node's cables.
# shellcheck shell=bash

# links_set PLACE up|down: at the switch, so the place sees its carrier go and come.
links_set() {
    local interface
    for interface in mig0 gst0 "${PROJECTS[@]/%/0}"; do
        ! net_ip link show "$1-$interface" >/dev/null 2>&1 || net_ip link set "$1-$interface" "$2"
    done
}
