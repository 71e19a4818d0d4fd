# Starting, stopping and asking after the processes of a place.
# shellcheck shell=bash

SERVICES_CTL="broker conductor conductor2" # the second one only where its caller starts it
SERVICES_NODE="libvirtd agent"

# config_of PLACE [SERVICE]
config_of() { case ${2:-} in conductor2) printf '%s/%s/drover2.toml' "$RUN" "$1" ;; *) printf '%s/%s/drover.toml' "$RUN" "$1" ;; esac; }
log_of() { printf '%s/%s/%s.log' "$RUN" "$1" "$2"; }
pid_file_of() { printf '%s/%s/%s.pid' "$RUN" "$1" "$2"; }

# The recorded process, provided that it is still that one: alive, and in the place's network.
pid_of() {
    local pid
    pid=$(cat "$(pid_file_of "$1" "$2")" 2>/dev/null) || return 1
    [ -n "$pid" ] && [ "/proc/$pid/ns/net" -ef "$(netns_of "$1")" ] &&
        ! grep -qs '^State:[[:space:]]*Z' "/proc/$pid/status" && echo "$pid"
}

running() { pid_of "$1" "$2" >/dev/null; }
gone() { ! running "$1" "$2"; }

program_of() {
    case $1 in
        conductor|conductor2) echo "$BIN/drover-conductor" ;;
        agent) echo "$BIN/drover-compute" ;;
    esac
}

# spawn PLACE NAME CMD…: in the background, in a session of its own, logging to a file.
spawn() {
    local place=$1 name=$2; shift 2
    printf -- '---- %s: %s starts\n' "$(date '+%F %T')" "$name" >>"$(log_of "$place" "$name")"
    # A fresh environment: what a service does must not depend on who called `up`.
    setsid nsenter --net="$(netns_of "$place")" --mount="$RUN/ns/$place.mnt" --uts="$RUN/ns/$place.uts" -- \
        env -i PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LANG=C.UTF-8 \
        RUST_BACKTRACE=1 "$@" </dev/null >>"$(log_of "$place" "$name")" 2>&1 9>&- &
    echo $! >"$(pid_file_of "$place" "$name")"
    wait_for 5 "the start of $name on $place" inside_or_gone "$place" $!
}
inside_or_gone() { [ "/proc/$2/ns/net" -ef "$(netns_of "$1")" ] || ! kill -0 "$2"; }

log_tail() { tail -n "${3:-15}" "$(log_of "$1" "$2")" | sed 's/^/          | /' >&2; }

# ready_or_dead PLACE NAME CMD…: true when CMD holds, or when the process has ended (the caller tells which).
ready_or_dead() {
    local place=$1 name=$2; shift 2
    ! running "$place" "$name" || "$@"
}

# up_or_die PLACE NAME SECONDS CMD…: waits until CMD holds; a service that ends or hangs is reported with its log.
up_or_die() {
    local place=$1 name=$2 seconds=$3; shift 3
    wait_for "$seconds" "$name on $place" ready_or_dead "$place" "$name" "$@" && running "$place" "$name" && return
    local what="does not come up within $seconds s"
    running "$place" "$name" || what="ended right after its start"
    say "$name on $place $what; the end of $(log_of "$place" "$name"):"
    log_tail "$place" "$name"
    return 1
}

port_open() { in_place "$1" bash -c "exec 3<>/dev/tcp/$2/$3"; }

# ---- the broker -----------------------------------------------------------------------------------

broker_configure() {
    local etc=$STATE/ctl/etc/rabbitmq
    cat >"$etc/rabbitmq-env.conf" <<END
NODENAME=drover@localhost
END
    cat >"$etc/rabbitmq.conf" <<END
listeners.tcp.default = 5672
default_user = $AMQP_USER
default_pass = $AMQP_PASSWORD
disk_free_limit.absolute = 100MB
log.console.level = warning
END
    chown -R rabbitmq:rabbitmq "$STATE"/ctl/var/{lib,log}/rabbitmq
    # Readable on the way down to its own directories.
    chmod 755 "$STATE" "$STATE/ctl" "$STATE/ctl/var" "$STATE/ctl/var/lib" "$STATE/ctl/var/log"
}

broker_start() {
    broker_configure
    spawn ctl broker setpriv --reuid=rabbitmq --regid=rabbitmq --init-groups \
        env HOME=/var/lib/rabbitmq /usr/lib/rabbitmq/bin/rabbitmq-server
    up_or_die ctl broker 60 port_open ctl "$CTL_ADDRESS" 5672
}

# ---- libvirtd -------------------------------------------------------------------------------------

libvirtd_configure() {
    local node=$1 etc=$STATE/$1/etc/libvirt
    mkdir -p "$STATE/$node/var/lib/libvirt/images" "$STATE/$node/var/log/libvirt/qemu"
    [ -s "$STATE/$node/host-uuid" ] || cat /proc/sys/kernel/random/uuid >"$STATE/$node/host-uuid"
    # Open on the migration network alone, which exists in the devstack's own namespaces alone.
    cat >"$etc/libvirtd.conf" <<END
host_uuid = "$(cat "$STATE/$node/host-uuid")"
listen_tls = 0
listen_tcp = 1
listen_addr = "$(address_of "$node")"
auth_tcp = "none"
auth_unix_ro = "none"
auth_unix_rw = "none"
unix_sock_group = "root"
unix_sock_ro_perms = "0700"
log_outputs = "2:stderr"
END
    cat >"$etc/qemu.conf" <<END
user = "root"
group = "root"
dynamic_ownership = 0
remember_owner = 0
security_driver = "none"
namespaces = []
cgroup_controllers = []
stdio_handler = "file"
migration_address = "$(address_of "$node")"
migration_host = "$(address_of "$node")"
END
}

libvirtd_answers() { virsh_on "$1" uri; }

libvirtd_start() {
    libvirtd_configure "$1"
    rm -f "$RUN/$1/run/libvirtd.pid"
    spawn "$1" libvirtd libvirtd --listen
    up_or_die "$1" libvirtd 30 libvirtd_answers "$1" || return
    # virsh creates missing disks at a migration's destination only where a pool covers them.
    if ! virsh_on "$1" pool-info default >/dev/null 2>&1; then
        virsh_on "$1" pool-define-as default dir --target /var/lib/libvirt/images >/dev/null
        virsh_on "$1" pool-autostart default >/dev/null
    fi
    wait_for 10 "the storage pool on $1" pool_active "$1"
    # The first question about QEMU takes seconds; it is put here, where the nodes start side by side.
    virsh_on "$1" domcapabilities >/dev/null
}
# libvirtd starts the pool by itself, sooner or later.
pool_active() { virsh_on "$1" pool-info default | grep 'State: *running' || virsh_on "$1" pool-start default; }

# ---- Drover ---------------------------------------------------------------------------------------

# Where the record is: in a file of its own, unless a test has written another URL to `database-url`.
database_url() { cat "$RUN/ctl/database-url" 2>/dev/null || printf 'sqlite://%s/ctl/conductor.sqlite' "$STATE"; }

# What a person or a test wants besides, keys of the place's own section first, is in `settings.toml` beside it.
config_write() {
    local place=$1 config new
    config=$(config_of "$place" "$2")
    new=$config.new
    {
        printf '[messaging]\nurl = "%s"\ncontrol_exchange = "%s"\n' "$AMQP_URL" "$EXCHANGE"
        [ "$place" != ctl ] || [ -e "$RUN/ctl/no-fences" ] || fences_config
        case $place in
            ctl)
                printf '\n[conductor]\nname = "%s"\ndatabase_url = "%s"\n' "ctl${2#conductor}" "$(database_url)" ;;
            kvm*) cat <<END

[compute]
host = "$place"
libvirt_uri = "qemu:///system"
migration_address = "$(address_of "$place")"
state_dir = "/var/lib/drover"
END
        esac
        cat "$RUN/$place/settings.toml" 2>/dev/null || true
    } >"$new"
    mv "$new" "$config"
}

# One fencing agent for each node there may be. It is run without an environment, so that it is a wrapper which has
# what tells one devstack from another.
fences_config() {
    local n agent=$STATE/ctl/fence # /run may forbid programs
    {
        printf '#!/bin/bash\n# Made by devstack/lib/services.sh.\nPATH=%q\n' "$PATH"
        printf 'export PATH DROVER_DEVSTACK_NAME=%q DROVER_DEVSTACK_STATE=%q DROVER_DEVSTACK_RUN=%q DROVER_BIN_DIR=%q\n' \
            "$NAME" "$STATE" "$RUN" "$BIN"
        printf 'exec %q "$@"\n' "$DEVSTACK_DIR/fence"
    } >"$agent"
    chmod 755 "$agent"
    for ((n = 1; n <= MAX_NODES; n++)); do
        printf '\n[fence.kvm%d]\nagent = "%s"\nparameters = { port = "kvm%d" }\n' "$n" "$agent" "$n"
    done
}

drover_start() {
    local place=$1 name=$2 program
    program=$(program_of "$name")
    [ -x "$program" ] || die "$program does not exist" "build it: cargo build --release (in $REPO_DIR)"
    config_write "$place" "$name"
    spawn "$place" "$name" "$program" --config "$(config_of "$place" "$name")"
    # What is wrong with a service at its start shows within the first second.
    up_or_die "$place" "$name" 10 sleep 1
}

# ---- any of them ----------------------------------------------------------------------------------

service_start() {
    local place=$1 name=$2
    ! running "$place" "$name" || return 0
    case $name in
        broker) broker_start ;;
        libvirtd) libvirtd_start "$place" ;;
        conductor|conductor2|agent) drover_start "$place" "$name" ;;
    esac
}

# service_tell PLACE NAME SIGNAL: the broker is a process group of shell, virtual machine and helpers.
service_tell() {
    local pid
    pid=$(pid_of "$1" "$2") || return 0
    if [ "$2" = broker ]; then kill "-$3" -- "-$pid" 2>/dev/null || true; else kill "-$3" "$pid" || true; fi
}

# service_signal PLACE NAME SIGNAL: and waits until the process is gone.
service_signal() {
    local place=$1 name=$2 signal=$3 pid
    pid=$(pid_of "$place" "$name") || return 0
    service_tell "$place" "$name" "$signal"
    wait_for 30 "the end of $name on $place (process $pid)" gone "$place" "$name"
}

# Not running, or not the program that lies there now.
service_stale() {
    local pid
    pid=$(pid_of "$1" "$2") || return 0
    [ -n "$(program_of "$2")" ] || return 1
    [ ! "/proc/$pid/exe" -ef "$(program_of "$2")" ]
}

# ---- all of Drover --------------------------------------------------------------------------------

drover() { DROVER_CONFIG=$(config_of ctl) in_place ctl "$BIN/drover" "$@"; }

# field NAME…: out of JSON on standard input; a NAME that is a number counts an array's elements.
field() {
    python3 -c 'import functools, json, sys
step = lambda value, name: value[int(name)] if isinstance(value, list) else (value or {}).get(name)
print(functools.reduce(step, sys.argv[1:], json.load(sys.stdin)))' "$@"
}

# Drover's own doctor finds nothing wrong, and every node has reported.
drover_whole() {
    local listed node
    in_place ctl "$BIN/drover" --config "$(config_of ctl)" doctor || return
    listed=$(in_place ctl "$BIN/drover" --config "$(config_of ctl)" node list --json)
    for node in $(nodes); do [[ $listed == *"\"$node\""* ]] || return; done
}

# Every project that is not there. One that only guests name, and nobody has created, is shown too.
projects_create() {
    local project
    for project in "${PROJECTS[@]}"; do
        [ "$(drover --json project show "$project" 2>/dev/null | field created 2>/dev/null)" != True ] || continue
        drover project create "$project" --network "lan=bridge:br-$project" \
            --storage "directory:$(project_directory "$project")" \
            --instances 20 --vcpus 20 --memory-mib 8192 --disk-gib 20 >/dev/null ||
            die "project $project could not be created"
    done
}

drover_ready() {
    wait_for 30 "the agents' first reports" drover_whole && return
    in_place ctl "$BIN/drover" --config "$(config_of ctl)" doctor >&2 || true
    die "Drover is up and not well" "logs: $RUN/*/*.log"
}
