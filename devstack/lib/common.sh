# Sourced by every command of the devstack: names, paths, addresses, and how to run something in a place.
#
# A *place* is a network, a mount and a UTS namespace: `ctl` (broker and conductor), `client` (reaches the
# guests), `alpha` and `beta` (each reaches the guests of that project), and a node kvm1, kvm2, … The namespaces are pinned by files, so they outlive every process in
# them, and what runs in a place can be found, and stopped, without trusting any pid file.
# shellcheck shell=bash

set -euo pipefail

DEVSTACK_DIR=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
REPO_DIR=$(dirname "$DEVSTACK_DIR")

# Another name makes another devstack beside this one.
NAME=${DROVER_DEVSTACK_NAME:-drover-devstack}
STATE=${DROVER_DEVSTACK_STATE:-/var/lib/$NAME}       # disks, definitions, databases
RUN=${DROVER_DEVSTACK_RUN:-/run/$NAME}               # namespaces, sockets, configs, logs
CACHE=${DROVER_DEVSTACK_CACHE:-$REPO_DIR/.devstack}  # the guests' kernel, kept across `down`
BIN=${DROVER_BIN_DIR:-${CARGO_TARGET_DIR:-$REPO_DIR/target}/release}

SHARED=$STATE/shared        # the same directory on all nodes: shared storage
MAX_NODES=9
CTL_ADDRESS=100.100.100.10
CLIENT_ADDRESS=10.99.0.254
AMQP_USER=drover
AMQP_PASSWORD=drover        # the broker can be reached from the devstack's own namespaces alone
AMQP_URL=amqp://$AMQP_USER:$AMQP_PASSWORD@$CTL_ADDRESS:5672/
EXCHANGE=drover
# Projects that have a network and a directory of their own on every node. Their networks cannot reach each other,
# nor that of the other guests, and all use the same addresses, as tenants' networks do.
PROJECTS=(alpha beta)

say()  { printf '%s\n' "devstack: $*" >&2; }
die()  { printf '%s\n' "devstack: $1" >&2; shift; [ $# -eq 0 ] || printf '          %s\n' "$@" >&2; exit 1; }

need_root() {
    [ "$(id -u)" -eq 0 ] || die "$(basename "$0") needs root (it makes namespaces and runs libvirtd)" "run it with sudo"
}

# Prints a command's own header comment as its help.
help_of() { sed -n '2,/^[^#]/{s/^# \{0,1\}//p}' "$0"; }

help_if_asked() {
    case "${1:-}" in -h|--help) help_of; exit 0;; esac
}

usage_error() { printf '%s\n' "$(basename "$0"): $1" >&2; help_of >&2; exit 2; }

# wait_for SECONDS WHAT CMD…: polls a readiness condition until it holds.
wait_for() {
    local deadline=$((SECONDS + $1)) what=$2; shift 2
    until "$@" >/dev/null 2>&1; do
        [ "$SECONDS" -lt "$deadline" ] || { say "gave up waiting for $what"; return 1; }
        sleep 0.1
    done
}

# One command changes the devstack at a time.
take_lock() {
    exec 9>"/run/$NAME.lock"
    flock -n 9 || { say "waiting for another devstack command to finish"; flock 9; }
}

# ---- places ---------------------------------------------------------------------------------------

netns_of() { printf '/run/netns/%s.%s' "$NAME" "$1"; }

address_of() {
    case $1 in
        ctl) printf %s "$CTL_ADDRESS" ;;
        kvm*) printf '100.100.100.%d' "$((10 + ${1#kvm}))" ;;
        *) is_client "$1" && printf %s "$CLIENT_ADDRESS" ;;
    esac
}

is_project() { [[ " ${PROJECTS[*]} " == *" $1 "* ]]; }
is_client() { [ "$1" = client ] || is_project "$1"; }

place_exists() { [ -e "$RUN/$1/ready" ] && [ -e "$(netns_of "$1")" ]; }

need_place() {
    case $1 in
        ctl|kvm[1-9]) ;;
        *) is_client "$1" || die "there is no place '$1'" "places: ctl, client, ${PROJECTS[*]}, $(nodes | xargs)" ;;
    esac
    place_exists "$1" || die "'$1' is not running" "start the devstack with $DEVSTACK_DIR/up"
}

# Where a project's disks are, on every node.
project_directory() { printf '/var/lib/libvirt/projects/%s' "$1"; }

# The nodes that exist, in order.
nodes() {
    local n
    for ((n = 1; n <= MAX_NODES; n++)); do
        ! place_exists "kvm$n" || echo "kvm$n"
    done
}

# in_place PLACE CMD…, and the same in place of this shell.
in_place() { (exec_in_place "$@"); }
exec_in_place() {
    local place=$1; shift
    exec nsenter --net="$(netns_of "$place")" --mount="$RUN/ns/$place.mnt" --uts="$RUN/ns/$place.uts" -- "$@"
}

# Every process in a place, but for this one and its ancestors.
pids_in() {
    local pid=$$ mine=" "
    while [ "$pid" -gt 1 ]; do
        mine+="$pid "
        pid=$(awk '/^PPid:/ {print $2}' "/proc/$pid/status")
    done
    ip netns pids "$NAME.$1" 2>/dev/null | while read -r pid; do
        [[ $mine == *" $pid "* ]] || echo "$pid"
    done
}

# Ends everything in a place at once, as a power cut would.
kill_all_in() {
    local pids
    for _ in $(seq 100); do
        pids=$(pids_in "$1")
        [ -n "$pids" ] || return 0
        # shellcheck disable=SC2086
        kill -KILL $pids 2>/dev/null || true
        sleep 0.05
    done
    die "processes in $1 do not end: $(echo "$pids" | xargs)" "see: ps -o pid,stat,cmd -p ${pids//$'\n'/,}"
}

libvirt_socket() { printf '%s/%s/run/libvirt/libvirt-sock' "$RUN" "$1"; }

# virsh_on NODE ARGS…: talks to the node's libvirtd over its socket, from wherever we are.
virsh_on() {
    local node=$1; shift
    virsh -q -c "qemu:///system?socket=$(libvirt_socket "$node")" "$@"
}
