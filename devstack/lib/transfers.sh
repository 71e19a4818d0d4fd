# Giving a guest to another project, and watching it from both projects' networks, from libvirt and from inside.
# shellcheck shell=bash

other_project() { printf '%s\n' "${PROJECTS[@]}" | grep -vx -m 1 "$1"; }

drover_knows_owner() { [ "$(drover --json instance show "$1" | field project_id)" = "$2" ]; }

# yes_no CMD…: says whether it holds.
yes_no() { if "$@" >/dev/null 2>&1; then echo yes; else echo no; fi; }

# watch_start GUEST NODE PLACE…: notes libvirt's events of the guest, and when its address answers in each place.
watch_start() {
    local place
    watch_directory=$(mktemp -d) watch_pids=()
    trap watch_end EXIT
    # Not by virsh_on: the process to be ended is virsh itself.
    virsh -q -c "qemu:///system?socket=$(libvirt_socket "$2")" event "$1" --event lifecycle --loop --timestamp \
        >"$watch_directory/events" &
    watch_pids+=($!)
    for place in "${@:3}"; do
        exec_in_place "$place" /usr/bin/python3 "$DEVSTACK_DIR/lib/arp-probe" "$(guest_ip "$1")" >"$watch_directory/$place" &
        watch_pids+=($!)
        wait_for 10 "the probe in $place" grep -q ready "$watch_directory/$place"
    done
    wait_for 10 "libvirt's events" event_heard "$1" "$2" 0
}

# watch_stop GUEST NODE: what was noted is whole then.
watch_stop() {
    wait_for 10 "libvirt's events" event_heard "$1" "$2" "$(events_defined)"
    kill "${watch_pids[@]}"
    wait "${watch_pids[@]}" || true
    watch_pids=()
}

watch_end() {
    [ ${#watch_pids[@]} -eq 0 ] || kill "${watch_pids[@]}" 2>/dev/null || true
    rm -rf "$watch_directory"
}

events_defined() { grep -c ': Defined' "$watch_directory/events" || true; }

# event_heard GUEST NODE COUNT: more definitions than that were heard of. To define the guest as it is changes nothing
# and is an event, so whoever hears of it has heard everything before.
event_heard() {
    virsh_on "$2" dumpxml "$1" --inactive --security-info >"$watch_directory/xml"
    virsh_on "$2" define "$watch_directory/xml"
    sleep 0.1
    [ "$(events_defined)" -gt "$3" ]
}

# For how long the guest was suspended in all, ms, by libvirt's events.
watch_paused_ms() {
    python3 - "$watch_directory/events" <<'END'
import datetime, sys
paused, since = 0.0, None
for line in open(sys.argv[1]):
    at = datetime.datetime.strptime(line.split(": event")[0], "%Y-%m-%d %H:%M:%S.%f%z")
    what = line.rsplit(": ", 1)[1].split()[0]
    if what == "Suspended" and since is None:
        since = at
    elif what == "Resumed" and since is not None:
        paused, since = paused + (at - since).total_seconds(), None
print("for ever" if since else round(paused * 1000))
END
}

# watch_cut_ms GIVER RECEIVER: from the last answer on the one network to the first on the other; negative if the
# guest was on both at once.
watch_cut_ms() {
    local last first
    last=$(tail -n 1 "$watch_directory/$1" | field last_ms)
    first=$(tail -n 1 "$watch_directory/$2" | field first_ms)
    python3 -c 'import sys
last, first = sys.argv[1:]
print("unknown" if "None" in (last, first) else round(float(first) - float(last), 1))' "$last" "$first"
}

# guest_clock_ms NAME PLACE: how far the guest's clock is behind the machine's. What that grows by, the guest has
# stood still for.
guest_clock_ms() {
    in_place "$2" /usr/bin/python3 -c 'import json, socket, sys, time
start = time.monotonic()
with socket.create_connection((sys.argv[1], 9), timeout=10) as guest:
    told = json.loads(guest.makefile().readline())
print(round((start + time.monotonic()) / 2 * 1000 - told["uptime_ms"], 1))' "$(guest_ip "$1")"
}

# traces_of WORD GUEST NODE: lines of its definitions with the word in it, and its files in that project's directory.
traces_of() {
    virsh_on "$3" dumpxml "$2" | grep -ci "$1" || true
    virsh_on "$3" dumpxml "$2" --inactive --security-info | grep -ci "$1" || true
    find "$STATE/$3$(project_directory "$1")" -name "$2[.-]*" | wc -l
}

# usage_words: of a project's JSON.
usage_words() {
    python3 -c 'import json, sys
used = json.load(sys.stdin)["usage"]
print("%(instances)d instances, %(vcpus)d vCPUs, %(memory_mb)d MiB" % used, end=", ")
print("disks of %d MiB" % (used["disk_bytes"] >> 20))'
}
