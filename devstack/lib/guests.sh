# Building the guests' kernel and user space, and making guests.
#
# vm1, vm2, … have their disk on their node; shared1, … have theirs on the shared directory. vmN is at
# 10.99.0.(10+N), sharedN at 10.99.0.(200+N), on whatever network. They are put on the nodes in turn.
# shellcheck shell=bash

BOOT=/var/lib/libvirt/boot          # on every node: vmlinuz, initrd, qemu-emulated
IMAGES=/var/lib/libvirt/images
DISK_MIB=64
GUEST_MEMORY_MIB=128
PROJECT=demo                        # of guests that are made: this one, or one of PROJECTS
GUEST_FORMAT=qcow2                  # of their first disk
GUEST_CACHE=none                    # its cache mode

guest_number() { printf %s "${1//[!0-9]/}"; }

guest_ip() {
    case $1 in
        vm*) echo "10.99.0.$((10 + $(guest_number "$1")))" ;;
        shared*) echo "10.99.0.$((200 + $(guest_number "$1")))" ;;
        *) echo - ;;
    esac
}

guest_mac() {
    local ip; ip=$(guest_ip "$1")
    printf '52:54:00:0a:63:%02x' "${ip##*.}"
}

# The same name has the same UUID in every devstack.
guest_uuid() {
    local h; h=$(printf 'drover-devstack:%s' "$1" | sha1sum)
    printf '%s-%s-5%s-8%s-%s\n' "${h:0:8}" "${h:8:4}" "${h:13:3}" "${h:17:3}" "${h:20:12}"
}

# Downloads Debian's cloud kernel, once, and unpacks what a guest needs of it. Nothing is installed.
kernel_fetch() {
    local package work
    [ ! -e "$CACHE/kernel/vmlinuz" ] || return 0
    work=$(mktemp -d)
    (
        cd "$work"
        package=$(apt-cache depends linux-image-cloud-amd64 | awk '/Depends: linux-image/ {print $2; exit}')
        if [ -z "$package" ]; then
            apt_get update >apt.log 2>&1 || { cat apt.log >&2; exit 1; }
            package=$(apt-cache depends linux-image-cloud-amd64 | awk '/Depends: linux-image/ {print $2; exit}')
        fi
        say "fetching the guests' kernel ($package)"
        # Package lists may be older than the archive.
        apt_get download "$package" >apt.log 2>&1 ||
            { apt_get update >apt.log 2>&1 && apt_get download "$package" >apt.log 2>&1; } ||
            { cat apt.log >&2; exit 1; }
        mkdir kernel
        dpkg-deb --fsys-tarfile ./*.deb | tar -x --wildcards './boot/vmlinuz*' './lib/modules/*/kernel/drivers/*' \
            './lib/modules/*/kernel/net/core/*'
        cp boot/vmlinuz* kernel/vmlinuz
        for module in virtio_ring virtio virtio_pci_legacy_dev virtio_pci_modern_dev virtio_pci virtio_blk \
            failover net_failover virtio_net evdev button; do
            find lib/modules -name "$module.ko" -exec cp {} kernel/ \;
        done
        mkdir -p "$CACHE"
        rm -rf "$CACHE/kernel"
        mv kernel "$CACHE/kernel"
    ) || { rm -rf "$work"; die "the guests' kernel could not be fetched" "it is Debian's package linux-image-cloud-amd64"; }
    rm -rf "$work"
}

initrd_build() {
    local source=$DEVSTACK_DIR/guestd/guestd.c work
    [ ! -e "$CACHE/initrd" ] || [ "$source" -nt "$CACHE/initrd" ] || return 0
    work=$(mktemp -d)
    mkdir -p "$work"/{dev,proc,modules}
    cp "$CACHE"/kernel/*.ko "$work/modules/"
    gcc -Wall -Wextra -O2 -static -pthread -o "$work/init" "$source" ||
        { rm -rf "$work"; die "guestd does not compile ($source)"; }
    strip "$work/init"
    # Not compressed: unpacking costs a guest without KVM more than reading.
    (cd "$work" && find . | busybox cpio -o -H newc) >"$CACHE/initrd.new" 2>/dev/null
    mv "$CACHE/initrd.new" "$CACHE/initrd"
    rm -rf "$work"
}

# /dev/kvm may exist and still not run a guest, so one is tried, once for each boot of this machine.
virt_type() {
    local file=$CACHE/virt-type boot type=qemu
    boot=$(cat /proc/sys/kernel/random/boot_id)
    if [ -n "${DROVER_VIRT_TYPE:-}" ]; then
        echo "$DROVER_VIRT_TYPE"
    elif grep -qs "^$boot " "$file"; then
        cut -d' ' -f2 "$file"
    else
        if [ -w /dev/kvm ] && timeout 5 qemu-system-x86_64 -accel kvm -m 128 -nographic -nodefaults -no-reboot \
            -serial stdio -kernel "$CACHE/kernel/vmlinuz" -initrd "$CACHE/initrd" \
            -append "console=ttyS0 quiet drover.probe" </dev/null 2>/dev/null | grep -q 'guestd: probe is up'; then
            type=kvm
        else
            say "KVM does not run a guest here: the guests are emulated"
        fi
        echo "$boot $type" >"$file"
        echo $type
    fi
}

node_boot_files() {
    local boot=$STATE/$1$BOOT file
    mkdir -p "$boot"
    for file in "$CACHE/kernel/vmlinuz" "$CACHE/initrd" "$DEVSTACK_DIR/lib/qemu-emulated"; do
        cmp -s "$file" "$boot/${file##*/}" && continue
        cp "$file" "$boot/.new"
        mv "$boot/.new" "$boot/${file##*/}" # a running QEMU keeps the old one
    done
    # What the guests' disks are based on, on every node alike.
    base_create "$STATE/$1$IMAGES/base.qcow2"
}

# Whole when it has its name: guests may be made side by side.
base_create() {
    local new=$1.$BASHPID
    [ ! -e "$1" ] || return 0
    qemu-img create -q -f qcow2 "$new" "${DISK_MIB}M"
    mv -n "$new" "$1"
    rm -f "$new"
}

guest_bridge() { if is_project "$PROJECT"; then echo "br-$PROJECT"; else echo br-guests; fi; }

# Where a new guest's disks are, on its node.
guest_directory() {
    case $1 in
        shared*) echo "$SHARED" ;;
        *) if is_project "$PROJECT"; then project_directory "$PROJECT"; else echo "$IMAGES"; fi ;;
    esac
}

# Guests of projects watch their clock: how long one stands still that changes hands is of interest.
guest_clock() { ! is_project "$PROJECT" || echo " drover.clock_ms=2"; }

guest_disk() { echo "$(guest_directory "$1")/$1.$GUEST_FORMAT"; }
guest_data_disk() { echo "$(guest_directory "$1")/$1-data.raw"; }

# guest_disk_create NAME NODE: empty, on the base; what is there already stays.
guest_disk_create() {
    local name=$1 file base=base.qcow2
    case $name in
        shared*)
            file=$(guest_disk "$name")
            base_create "$SHARED/$base" ;;
        *)
            file=$STATE/$2$(guest_disk "$name")
            # The base has no copy in the projects' directories.
            ! is_project "$PROJECT" || base=$IMAGES/$base ;;
    esac
    # In place, where the base is under that name.
    if [ "$GUEST_FORMAT" = raw ]; then
        truncate -s "${DISK_MIB}M" "$file"
    elif [ ! -e "$file" ]; then
        in_place "$2" qemu-img create -q -f qcow2 -F qcow2 -b "$base" "$(guest_disk "$name")"
    fi
    [ -n "${GUEST_DATA_MIB:-}" ] || return 0
    file=$(guest_data_disk "$name")
    case $name in shared*) ;; *) file=$STATE/$2$file ;; esac
    head -c "${GUEST_DATA_MIB}M" /dev/urandom >"$file"
}

# guest_xml NAME: its definition. The processor is the same for all, whatever the machine has, so that any guest
# can go anywhere.
guest_xml() {
    local name=$1 type emulator=/usr/bin/qemu-system-x86_64
    type=$(virt_type)
    [ "$type" = kvm ] || emulator=$BOOT/qemu-emulated
    cat <<END
<domain type='$type'>
  <name>$name</name>
  <uuid>$(guest_uuid "$name")</uuid>
  <metadata>
    <drover:instance xmlns:drover='https://drover.dev/xmlns/instance/1'>
      <drover:project>$PROJECT</drover:project>
      ${GUEST_PRIORITY:+<drover:priority>$GUEST_PRIORITY</drover:priority>}
      ${GUEST_ANTI_AFFINITY:+<drover:anti_affinity>$GUEST_ANTI_AFFINITY</drover:anti_affinity>}
    </drover:instance>
  </metadata>
  <memory unit='MiB'>$GUEST_MEMORY_MIB</memory>
  <vcpu>1</vcpu>
  <os>
    <type arch='x86_64' machine='pc'>hvm</type>
    <kernel>$BOOT/vmlinuz</kernel>
    <initrd>$BOOT/initrd</initrd>
    <cmdline>console=ttyS0 quiet panic=1 nokaslr mitigations=off drover.name=$name drover.ip=$(guest_ip "$name")/24 ${GUEST_CMDLINE:-}$(guest_clock)</cmdline>
  </os>
  <features><acpi/></features>
  <cpu mode='custom' match='exact'><model fallback='forbid'>qemu64</model></cpu>
  <on_reboot>restart</on_reboot>
  <on_crash>destroy</on_crash>
  <devices>
    <emulator>$emulator</emulator>
    <disk type='file' device='disk'>
      <driver name='qemu' type='$GUEST_FORMAT' cache='$GUEST_CACHE'/>
      <source file='$(guest_disk "$name")'/>
      <target dev='vda' bus='virtio'/>
    </disk>$(guest_data_xml "$name")$(guest_directory_xml)
    <interface type='bridge'>
      <mac address='$(guest_mac "$name")'/>
      <source bridge='$(guest_bridge)'/>
      <model type='virtio'/>
      <rom enabled='no'/>
    </interface>
    <controller type='usb' model='none'/>
    <serial type='file'><source path='/var/log/libvirt/qemu/$name.console.log' append='on'/></serial>
    <memballoon model='none'/>
  </devices>
</domain>
END
}

guest_data_xml() {
    [ -n "${GUEST_DATA_MIB:-}" ] || return 0
    cat <<END

    <disk type='file' device='disk'>
      <driver name='qemu' type='raw' cache='none'/>
      <source file='$(guest_data_disk "$1")'/>
      <target dev='vdb' bus='virtio'/>
    </disk>
END
}

# A directory of the node's, which ties it there.
guest_directory_xml() {
    [ -n "${GUEST_TIED:-}" ] || return 0
    cat <<END

    <filesystem type='mount' accessmode='mapped'>
      <source dir='$BOOT'/>
      <target dir='node'/>
      <readonly/>
    </filesystem>
END
}

# guest_create NAME NODE: made, and not started.
guest_create() {
    local xml=$RUN/$2/$1.xml
    guest_disk_create "$1" "$2"
    guest_xml "$1" >"$xml"
    virsh_on "$2" define "$xml" >/dev/null
}

guest_await() {
    wait_for 60 "$1's echo" guest_answers "$1" "$(guest_client "$1")" ||
        die "$1 is started and does not answer at $(guest_ip "$1"):7" \
            "its console: /var/log/libvirt/qemu/$1.console.log on $(guest_node "$1")"
}

# "NAME UUID NODE STATE", one line a guest. One that two nodes know (it is on its way) counts where it runs.
guests_list() {
    local node
    {
        for node in $(nodes); do list_on "$node" running --state-running; done
        for node in $(nodes); do
            list_on "$node" paused --state-paused
            list_on "$node" shut-off --inactive
        done
    } | awk 'NF >= 4 && !seen[$1]++ {uuid = $1; state = $NF; node = $(NF-1); $1 = $NF = $(NF-1) = "";
             gsub(/^ +| +$/, ""); print $0 "\t" uuid "\t" node "\t" state}' | sort -V
}

# list_on NODE WORD WHICH: a node that does not answer has none.
list_on() { virsh_on "$1" list "$3" --uuid --name 2>/dev/null | sed "s/\$/ $1 $2/" || true; }

guest_node() { guests_list | awk -F'\t' -v name="$1" '$1 == name {print $3}'; }

# guest_client NAME: the place that reaches the guest, by the bridge that it is on now: projects may change.
guest_client() {
    local node bridge
    for node in $(nodes); do
        bridge=$(virsh_on "$node" domiflist "$1" 2>/dev/null | awk '$2 == "bridge" {print $3; exit}')
        [ -z "$bridge" ] || break
    done
    if is_project "${bridge#br-}"; then echo "${bridge#br-}"; else echo client; fi
}

# guest_answers NAME PLACE: its echo reaches that place.
guest_answers() {
    in_place "$2" timeout 2 bash -c "exec 3<>/dev/tcp/$(guest_ip "$1")/7; echo drover >&3; read -r -t 1 line <&3; [ \"\$line\" = drover ]"
}

# guest_status NAME [9|10]: the guest's own account; on port 10 after it has checked everything.
guest_status() { in_place "$(guest_client "$1")" timeout 60 bash -c "exec 3<>/dev/tcp/$(guest_ip "$1")/${2:-9}; cat <&3"; }
