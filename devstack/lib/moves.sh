# Moving a guest, with Drover or with virsh, and watching it from outside meanwhile.
# shellcheck shell=bash

# The next node after the one given.
other_node() { nodes | awk -v here="$1" '$0 != here {print; exit}'; }

need_drover() {
    [ -x "$BIN/drover" ] || die "$BIN/drover does not exist" "build it: cargo build --release (in $REPO_DIR)"
    local place service
    for place in ctl $(nodes); do
        case $place in ctl) service=conductor ;; *) service=agent ;; esac
        running "$place" $service || die "$service on $place is not running" "start it: $DEVSTACK_DIR/service $place $service start"
    done
}

# plan_moves N: whether N guests move by the plan on standard input, which --dry-run --json gave.
plan_moves() {
    python3 -c 'import json, sys
moves = json.load(sys.stdin)["plan"]["moves"]
sys.exit(sum(m["verdict"]["verdict"] == "moves" for m in moves) != int(sys.argv[1]))' "$1"
}

drover_knows() { [ "$(drover instance show "$1" --json | field host)" = "$2" ]; }

move_with_drover() { drover instance migrate "$1" --live --to "$3" --wait; }

move_with_virsh() {
    local copy=--copy-storage-all
    # libvirt does not know the devstack's shared directory for shared storage.
    case $1 in shared*) copy=--unsafe ;; esac
    in_place "$2" virsh -q migrate --live --p2p --persistent --undefinesource $copy "$1" "qemu+tcp://$3/system"
}

# virsh leaves the disk behind at the source, where the next move would find it in its way. Storage pools keep
# their own idea of what is there.
tidy_after_virsh() {
    case $1 in shared*) return ;; esac
    rm -f "$STATE/$2$(guest_disk "$1")"
    virsh_on "$2" pool-refresh default >/dev/null
}

# probe_start NAME [ARGS…]: opens a TCP session to the guest's echo and waits until it is established.
probe_start() {
    local ready place
    place=$(guest_client "$1")
    coproc PROBE { exec_in_place "$place" /usr/bin/python3 "$DEVSTACK_DIR/lib/tcp-probe" "$(guest_ip "$1")" "${@:2}"; }
    # bash closes its own end as soon as the probe is gone, read or not.
    exec {probe_out}<&"${PROBE[0]}"
    probe_pid=$PROBE_PID
    read -r -t 15 ready <&"$probe_out" || true
    [ "${ready:-}" = ready ] || die "no TCP session to $1 at $(guest_ip "$1"):7"
}

# Ends the session; its account goes to probe_result.
probe_stop() {
    kill -TERM "$probe_pid"
    probe_result=
    read -r -t 20 probe_result <&"$probe_out" || true
    exec {probe_out}<&-
    wait "$probe_pid" 2>/dev/null || true
    [ -n "$probe_result" ] || die "the TCP probe ended without a result"
}

# What libvirt measured, in ms, as the destination tells it.
libvirt_downtime() { virsh_on "$2" domjobinfo "$1" --completed 2>/dev/null | awk '/^Total downtime/ {print $3}'; }
