# Making and removing the places and the networks between them.
#
# One more network namespace, `net`, is the switch: a bridge for the migration network, one for the guests' and one
# for each project's. Cutting a node's link is done there, so that the node sees its carrier go.
# shellcheck shell=bash

net_ip() { ip -n "$NAME.net" "$@"; }

netns_create() {
    [ -e "$(netns_of "$1")" ] || ip netns add "$NAME.$1"
    ip -n "$NAME.$1" link set lo up
}

switch_create() {
    local bridge
    netns_create net
    for bridge in migration guests "${PROJECTS[@]}"; do
        net_ip link show "$bridge" >/dev/null 2>&1 ||
            net_ip link add "$bridge" type bridge stp_state 0 forward_delay 0 mcast_snooping 0
        net_ip link set "$bridge" up
    done
}

# plug PLACE INTERFACE BRIDGE: a cable from the place to a bridge of the switch.
plug() {
    local port=$1-$2
    if ! net_ip link show "$port" >/dev/null 2>&1; then
        ip -n "$NAME.$1" link add "$2" type veth peer name "$port" netns "$NAME.net"
        net_ip link set "$port" master "$3" up
    fi
    ip -n "$NAME.$1" link set "$2" up
}

# wire_guests NODE INTERFACE NETWORK: a bridge for guests, and a cable from it to their network.
wire_guests() {
    local bridge=br-$3
    plug "$1" "$2" "$3"
    ip -n "$NAME.$1" link show "$bridge" >/dev/null 2>&1 ||
        ip -n "$NAME.$1" link add "$bridge" type bridge stp_state 0 forward_delay 0 mcast_snooping 0
    ip -n "$NAME.$1" link set "$2" master "$bridge"
    ip -n "$NAME.$1" link set "$bridge" up
}

# The directories that a place has for itself. Those which the machine lacks are made, empty, as mount
# points, and noted for `down` to remove.
private_dirs() {
    case $1 in
        kvm*) echo /etc/libvirt /var/lib/libvirt /var/cache/libvirt /var/log/libvirt /var/lib/drover ;;
        ctl) echo /etc/rabbitmq /var/lib/rabbitmq /var/log/rabbitmq ;;
    esac
}

hosts_write() {
    local n
    {
        echo "127.0.0.1 localhost"
        echo "$CTL_ADDRESS ctl"
        for ((n = 1; n <= MAX_NODES; n++)); do echo "$(address_of "kvm$n") kvm$n"; done
    } >"$RUN/hosts"
}

# libvirt's QEMU driver wants its default user to exist, even where it is told to use another. The package that
# would make it brings services along, so the places have it in account files of their own.
accounts_write() {
    cp /etc/passwd /etc/group "$RUN/"
    getent passwd libvirt-qemu >/dev/null ||
        echo 'libvirt-qemu:x:64055:64055:Libvirt QEMU:/var/lib/libvirt:/usr/sbin/nologin' >>"$RUN/passwd"
    getent group libvirt-qemu >/dev/null || echo 'libvirt-qemu:x:64055:' >>"$RUN/group"
    getent group kvm >/dev/null || echo 'kvm:x:64056:' >>"$RUN/group"
}

place_create() {
    local place=$1 directory project network
    if ! place_exists "$place"; then
        netns_create "$place"
        place_unpin "$place"
        rm -rf "${RUN:?}/$place" # of before a restart of the machine
        mkdir -p "$RUN/$place/run" "$STATE/$place"
        for directory in $(private_dirs "$place"); do
            [ -e "$directory" ] || { mkdir -p "$directory"; echo "$directory" >>"$STATE/made-directories"; }
        done
        touch "$RUN/ns/$place.mnt" "$RUN/ns/$place.uts"
        # From inside, and sees what the host mounts later but not the other way round.
        nsenter --net="$(netns_of "$place")" -- \
            unshare --mount="$RUN/ns/$place.mnt" --uts="$RUN/ns/$place.uts" --propagation slave -- \
            bash "$DEVSTACK_DIR/lib/place-init" "$place" ||
            die "the namespaces of '$place' could not be made" \
                "this needs a kernel and a container that allow mounts: try it on a plain virtual machine"
    fi
    case $place in
        kvm*)
            plug "$place" mig0 migration
            wire_guests "$place" gst0 guests
            for project in "${PROJECTS[@]}"; do
                wire_guests "$place" "${project}0" "$project"
                mkdir -p "$STATE/$place$(project_directory "$project")"
            done
            ip -n "$NAME.$place" addr replace "$(address_of "$place")/24" dev mig0 ;;
        ctl)
            plug ctl mig0 migration
            ip -n "$NAME.ctl" addr replace "$CTL_ADDRESS/24" dev mig0 ;;
        *)
            case $place in client) network=guests ;; *) network=$place ;; esac
            plug "$place" gst0 "$network"
            ip -n "$NAME.$place" addr replace "$CLIENT_ADDRESS/24" dev gst0 ;;
    esac
    touch "$RUN/$place/ready"
}

places_prepare() {
    mkdir -p "$RUN/ns" "$STATE" "$SHARED"
    # Namespaces can only be pinned under a mount that is not propagated.
    if [ "$(findmnt -n -o PROPAGATION --mountpoint "$RUN/ns" || true)" != private ]; then
        mount --bind "$RUN/ns" "$RUN/ns"
        mount --make-private "$RUN/ns"
    fi
    [ -e "$RUN/group" ] || { hosts_write; accounts_write; }
    switch_create
    outside_hold
}

# A process with the machine's own mounts, for whoever has to leave a place (devstack/fence). It is in the switch's
# network, so that it goes with it.
outside_hold() {
    local pid
    pid=$(cat "$RUN/outside.pid" 2>/dev/null) && [ "/proc/$pid/ns/net" -ef "$(netns_of net)" ] && return
    setsid nsenter --net="$(netns_of net)" -- sleep infinity </dev/null >/dev/null 2>&1 9>&- &
    echo $! >"$RUN/outside.pid"
}

place_unpin() {
    local file
    for file in "$RUN/ns/$1.mnt" "$RUN/ns/$1.uts"; do
        while mountpoint_file "$file"; do umount "$file"; done
    done
}
mountpoint_file() { grep -qs " $1 " /proc/self/mountinfo; }

place_remove() {
    local place=$1
    if [ -e "$(netns_of "$place")" ]; then
        kill_all_in "$place"
        place_unpin "$place"
        ip netns del "$NAME.$place"
    else
        place_unpin "$place"
    fi
}

# Everything, whatever state it is in.
places_remove() {
    local netns directory
    # Power cuts first: nothing may restart, or write, what the next line removes.
    for netns in /run/netns/"$NAME".*; do
        [ -e "$netns" ] || continue
        kill_all_in "${netns##*/"$NAME".}"
    done
    for netns in /run/netns/"$NAME".*; do
        [ -e "$netns" ] || continue
        place_remove "${netns##*/"$NAME".}"
    done
    for netns in "$RUN"/ns/*; do
        while mountpoint_file "$netns"; do umount "$netns"; done
    done
    while mountpoint_file "$RUN/ns"; do umount -l "$RUN/ns"; done
    if [ -e "$STATE/made-directories" ]; then
        # Not while another devstack has something mounted there: removing a mount point unmounts it everywhere.
        while read -r directory; do
            grep -qs " $directory " /proc/[0-9]*/mountinfo || rmdir "$directory" 2>/dev/null || true
        done <"$STATE/made-directories"
    fi
    # A place's mounts lie in its own mount namespace, which is gone: these are plain files.
    rm -rf --one-file-system "$RUN" "$STATE"
}
