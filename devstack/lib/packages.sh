# The one list of Debian packages, and how they are installed.
# shellcheck shell=bash

PACKAGES=(
    libvirt-daemon libvirt-daemon-driver-qemu libvirt-clients   # a libvirtd and virsh per node
    qemu-system-x86 qemu-utils                                  # the guests
    swtpm swtpm-tools                                           # TPMs of guests, for tests
    rsync libnbd-bin                                            # peers of bench-disks
    rabbitmq-server                                             # the broker
    iproute2 util-linux procps                                  # namespaces
    postgresql                                                  # the other database, for tests
    gcc libc6-dev busybox-static                                # the guests' user space
    libvirt-dev pkg-config ca-certificates                      # what cargo needs to build Drover
    g++                                                         # libFuzzer, for devstack/fuzz
    python3 python3-venv                                        # the TCP probe, the oslo.messaging peer
)

packages_missing() {
    local package
    for package in "${PACKAGES[@]}"; do
        dpkg-query -W -f '${db:Status-Status}\n' "$package" 2>/dev/null | grep -qx installed || echo "$package"
    done
}

POLICY=/usr/sbin/policy-rc.d

# Packages must not start their services: the devstack runs its own, in namespaces. A run that was killed
# in between left our policy behind, and the machine's own beside it: both cases end as they began.
policy_forbid() {
    policy_restore
    if [ -e $POLICY ]; then mv $POLICY $POLICY.before-drover; fi
    printf '#!/bin/sh\n# put here by drover devstack while it installs packages\nexit 101\n' >$POLICY
    chmod +x $POLICY
}
policy_restore() {
    if grep -qs 'drover devstack' $POLICY; then rm -f $POLICY; fi
    if [ -e $POLICY.before-drover ]; then mv $POLICY.before-drover $POLICY; fi
}

apt_get() {
    DEBIAN_FRONTEND=noninteractive apt-get -q -y -o DPkg::Lock::Timeout=600 -o APT::Sandbox::User=root \
        -o Dpkg::Options::=--force-confold "$@" </dev/null
}

# A machine may carry parts of QEMU from elsewhere, which the release's own QEMU cannot sit beside: apt then
# refuses, or would remove those parts. Then, and only then, all of QEMU is brought to the release's version.
apt_install() {
    local log=$1; shift
    apt_get install --no-install-recommends --no-remove "$@" >"$log" 2>&1 && return
    grep -qE 'unmet dependencies|remove is disabled' "$log" || return 1
    local pins=$log.pins package qemu=()
    for package in "${PACKAGES[@]}"; do [[ $package != qemu-* ]] || qemu+=("$package"); done
    printf 'Package: qemu-*\nPin: release o=Debian\nPin-Priority: 1001\n' >"$pins"
    apt_get -o Dir::Etc::Preferences="$pins" install --no-install-recommends --allow-downgrades "$@" "${qemu[@]}" \
        >>"$log" 2>&1 || { rm -f "$pins"; return 1; }
    rm -f "$pins"
}

install_packages() {
    local missing log
    mapfile -t missing < <(packages_missing)
    [ ${#missing[@]} -gt 0 ] || return 0
    command -v apt-get >/dev/null || die "packages are missing and there is no apt-get: ${missing[*]}" \
        "the devstack is made for Debian 12"
    say "installing ${missing[*]}"
    log=$(mktemp)
    (
        trap policy_restore EXIT
        policy_forbid
        apt_get update >"$log" 2>&1 && apt_install "$log" "${missing[@]}"
    ) || { tail -n 20 "$log" >&2; die "installing packages failed (log: $log)" "missing: ${missing[*]}"; }
    rm -f "$log"
}
