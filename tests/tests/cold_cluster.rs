//! Cold migration of real guests between real libvirtds, asked for by the
//! operator's command: every kind of disk, the ways back, and what can go wrong
//! going wrong for real.

use drover_tests::devstack::{Devstack, Guest, told};
use serde_json::Value;

/// So many MiB take some seconds at [`SLOWLY`]: time to be caught in the middle.
const DATA: &[&str] = &["--data-mib", "40"];
const SLOWLY: &[&str] = &["--bandwidth", "8"];

/// A guest that pays no attention to its power button.
const DEAF: &[&str] = &["--cmdline", "drover.acpi=ignore"];

const IMAGES: &str = "/var/lib/libvirt/images";

fn other(host: &str) -> &'static str {
    match host {
        "kvm1" => "kvm2",
        _ => "kvm1",
    }
}

/// Has it moved and waits for that; gives the record.
fn moved(devstack: &Devstack, guest: &Guest<'_>, to: &str, options: &[&str]) -> Value {
    let args = ["instance", "migrate", &guest.name, "--cold", "--to", to];
    let record = devstack.json(&[&args[..], options].concat());
    assert_eq!(record["status"], "finished", "{record:#}");
    assert_eq!(record["dest_host"], to, "{record:#}");
    record
}

/// Has a finished move confirmed; nothing is left of it where it was.
fn confirmed(devstack: &Devstack, guest: &Guest<'_>) {
    let record = devstack.json(&["instance", "confirm", &guest.name]);
    assert_eq!(record["status"], "confirmed", "{record:#}");
    assert_eq!(record["warnings"], Value::Array(Vec::new()), "{record:#}");
    devstack.assert_nothing_kept(id(&record));
}

/// Has a finished move reverted; nothing is left of it where it went.
fn reverted(devstack: &Devstack, guest: &Guest<'_>) {
    let record = devstack.json(&["instance", "revert", &guest.name, "--yes"]);
    assert_eq!(record["status"], "reverted", "{record:#}");
    assert_eq!(record["warnings"], Value::Array(Vec::new()), "{record:#}");
    devstack.assert_nothing_kept(id(&record));
    guest.assert_no_trace_on(record["dest_host"].as_str().expect("it went somewhere"));
}

fn id(record: &Value) -> &str {
    record["uuid"].as_str().expect("a record")
}

fn decided(record: &Value, what: &str) -> bool {
    let all = record["decisions"].as_array().into_iter().flatten();
    all.filter_map(|d| d["text"].as_str())
        .any(|text| text.contains(what))
}

fn count(account: &Value, what: &str) -> u64 {
    account[what]
        .as_u64()
        .unwrap_or_else(|| panic!("{account}"))
}

/// A move that did not come about: the guest runs where it was, and nothing is
/// left of the attempt.
fn assert_back(devstack: &Devstack, guest: &Guest<'_>, record: &Value) {
    assert_eq!(record["status"], "failed", "{record:#}");
    guest.assert_only_on("kvm1", "running");
    guest.assert_no_trace_on("kvm2");
    devstack.assert_nothing_kept(id(record));
    guest.until_up();
    guest.check();
}

// ---- what moves

/// Where a guest that runs is afterwards, and what it has to say.
fn assert_runs(guest: &Guest<'_>, host: &str, before: &Value) -> Value {
    guest.until_up();
    guest.assert_only_on(host, "running");
    let after = guest.check();
    // All that it wrote and heard was written, and nothing but that.
    assert!(
        count(&after, "disk_found") >= count(before, "disk_written"),
        "before {before}, after {after}"
    );
    after
}

fn there_and_back(name: &str) {
    let Some(devstack) = Devstack::take() else {
        return;
    };
    let guest = devstack.guest(name);
    let mut before = guest.check();
    for to in ["kvm2", "kvm1"] {
        let record = moved(&devstack, &guest, to, &[]);
        before = assert_runs(&guest, to, &before);
        assert!(record["downtime_ms"].as_u64() > Some(0), "{record:#}");
        guest.until_known(to);
        confirmed(&devstack, &guest);
        guest.assert_no_trace_on(other(to));
    }
    assert!(count(&before, "disk_verified") > 0, "{before}");
}

#[test]
fn a_running_guest_moves_there_and_back() {
    there_and_back("vm31");
}

#[test]
fn a_running_guest_with_a_shared_disk_moves_there_and_back() {
    there_and_back("shared31");
}

fn definition(devstack: &Devstack, host: &str, guest: &Guest<'_>) -> String {
    let args = [host, "virsh", "dumpxml", "--inactive", &guest.name];
    devstack.ok("on", &args)
}

#[test]
fn a_guest_that_is_off_moves_and_stays_off() {
    let Some(devstack) = Devstack::take() else {
        return;
    };
    let guest = devstack.guest_with("vm32", &["--off", "--data-mib", "8"]);
    let disks = [".qcow2", "-data.raw"].map(|end| format!("{IMAGES}/vm32{end}"));
    let sums = |host| disks.each_ref().map(|path| devstack.sha256(host, path));
    let (before, defined) = (sums("kvm1"), definition(&devstack, "kvm1", &guest));
    for to in ["kvm2", "kvm1"] {
        let record = moved(&devstack, &guest, to, &[]);
        assert_eq!(record["downtime_ms"], Value::Null, "{record:#}");
        guest.assert_only_on(to, "shut off");
        assert_eq!(sums(to), before);
        assert_eq!(definition(&devstack, to, &guest), defined);
        confirmed(&devstack, &guest);
        guest.assert_no_trace_on(other(to));
        guest.assert_only_on(to, "shut off");
    }
    devstack.ok("guest", &[&guest.name, "start"]);
    guest.check();
}

/// Gives a guest that is off another disk.
fn attach(devstack: &Devstack, guest: &Guest<'_>, path: &str, format: &str, target: &str) {
    let virsh = format!(
        "virsh attach-disk {} --config --source {path} --target {target} --targetbus virtio \
         --driver qemu --subdriver {format}",
        guest.name
    );
    devstack.sh("kvm1", &virsh);
}

/// Bytes on the disk of a sparse file, KiB.
fn allocated_kib(devstack: &Devstack, host: &str, path: &str) -> u64 {
    let line = devstack.ok("on", &[host, "du", "-k", path]);
    let kib = line.split_whitespace().next().expect("a number");
    kib.parse().expect("a number")
}

#[test]
fn every_disk_comes_whole_with_what_lies_under_it() {
    let Some(devstack) = Devstack::take() else {
        return;
    };
    let guest = devstack.guest_with("vm33", &["--off"]);
    let at = |end: &str| format!("{IMAGES}/vm33{end}");
    let (raw, base, top) = (at("-b.raw"), at("-base.img"), at("-c.qcow2"));
    let make = format!(
        "truncate -s 64M {raw}
         for at in 1 33 62; do dd if=/dev/urandom of={raw} bs=1M seek=$at count=1 conv=notrunc status=none; done
         head -c 12M /dev/urandom >{base}
         qemu-img create -q -f qcow2 -F raw -b {base} {top} 24M
         qemu-io -f qcow2 -c 'write -q -P 7 8M 2M' -c 'write -q -P 9 20M 64k' {top}"
    );
    devstack.sh("kvm1", &make);
    attach(&devstack, &guest, &raw, "raw", "vdb");
    attach(&devstack, &guest, &top, "qcow2", "vdc");

    let all = [at(".qcow2"), raw.clone(), top.clone(), base.clone()];
    let sums = |host| all.each_ref().map(|path| devstack.sha256(host, path));
    let before = sums("kvm1");
    let record = moved(&devstack, &guest, "kvm2", &[]);
    assert!(decided(&record, &format!("carries {base}")), "{record:#}");
    guest.assert_only_on("kvm2", "shut off");
    assert_eq!(sums("kvm2"), before);
    let holes = allocated_kib(&devstack, "kvm2", &raw);
    assert!(holes < 8 << 10, "{raw} has {holes} KiB");

    // Back as it was: all that came goes, the base image as well.
    reverted(&devstack, &guest);
    guest.assert_only_on("kvm1", "shut off");
    assert_eq!(sums("kvm1"), before);

    // For good; then back again, where the base image is now found.
    moved(&devstack, &guest, "kvm2", &[]);
    confirmed(&devstack, &guest);
    assert_eq!(sums("kvm2"), before);
    let left = devstack.sh("kvm1", &format!("ls {IMAGES}/vm33*"));
    assert_eq!(left.trim(), base, "others may use the base image");
    let record = moved(&devstack, &guest, "kvm1", &[]);
    assert!(decided(&record, "compared and not copied"), "{record:#}");
    confirmed(&devstack, &guest);
    assert_eq!(sums("kvm1"), before);
}

#[test]
fn a_base_image_that_differs_stops_nobody() {
    let Some(devstack) = Devstack::take() else {
        return;
    };
    let guest = devstack.guest("vm34");
    let (base, top) = (
        format!("{IMAGES}/vm34-base.img"),
        format!("{IMAGES}/vm34-c.qcow2"),
    );
    let make = format!("head -c 2M /dev/urandom >{base}");
    devstack.sh("kvm1", &make);
    devstack.sh("kvm2", &make);
    devstack.sh(
        "kvm1",
        &format!("qemu-img create -q -f qcow2 -F raw -b {base} {top}"),
    );
    let attach = format!(
        "virsh attach-disk vm34 --live --config --source {top} --target vdb --driver qemu --subdriver qcow2"
    );
    devstack.sh("kvm1", &attach);
    let session = guest.session();
    let before = guest.status();
    let end = devstack.start_cold(&["vm34", "--to", "kvm2"]).end();
    assert_eq!(end["status"], "failed", "{end:#}");
    let why = end["end_reason"].to_string();
    assert!(
        why.contains(&format!("{base} is another file on kvm2")) && why.contains("SHA-256"),
        "refused before anything is carried: {end:#}"
    );
    session.end();
    let after = guest.check();
    assert!(count(&after, "uptime_ms") > count(&before, "uptime_ms"));
    guest.assert_only_on("kvm1", "running");
    devstack.sh(
        "kvm2",
        &format!("test -e {base}; test ! -e {top}; rm {base}"),
    );
    devstack.assert_nothing_kept(id(&end));
}

#[test]
fn snapshots_inside_a_disk_come_along() {
    let Some(devstack) = Devstack::take() else {
        return;
    };
    let guest = devstack.guest_with("vm35", &["--off"]);
    let disk = format!("{IMAGES}/vm35.qcow2");
    let make = format!(
        "qemu-img snapshot -c of-the-image {disk}
         virsh snapshot-create-as vm35 first
         virsh snapshot-create-as vm35 second"
    );
    devstack.sh("kvm1", &make);
    let of_the_image = |host: &str| devstack.sh(host, &format!("qemu-img snapshot -l {disk}"));
    let of_the_guest = |host: &str| {
        let list = "virsh snapshot-list vm35 --tree; virsh snapshot-current vm35 --name";
        devstack.sh(host, list)
    };
    let before = (of_the_image("kvm1"), of_the_guest("kvm1"));
    for name in ["of-the-image", "first", "second"] {
        assert!(before.0.contains(name), "{}", before.0);
    }
    for to in ["kvm2", "kvm1"] {
        moved(&devstack, &guest, to, &[]);
        guest.assert_only_on(to, "shut off");
        assert_eq!((of_the_image(to), of_the_guest(to)), before);
        confirmed(&devstack, &guest);
        guest.assert_no_trace_on(other(to));
    }
    devstack.sh("kvm1", "virsh snapshot-revert vm35 first");
    // The way back has them as well.
    let before = (of_the_image("kvm1"), of_the_guest("kvm1"));
    moved(&devstack, &guest, "kvm2", &[]);
    reverted(&devstack, &guest);
    assert_eq!((of_the_image("kvm1"), of_the_guest("kvm1")), before);
}

#[test]
fn the_state_of_an_emulated_tpm_comes_along() {
    let Some(devstack) = Devstack::take() else {
        return;
    };
    let guest = devstack.guest_with("vm36", &["--off"]);
    let state = format!("/var/lib/libvirt/swtpm/{}/tpm2", guest.uuid());
    let make = format!(
        "virsh dumpxml --inactive vm36 >/tmp/vm36.xml
         sed -i \"s|</devices>|<tpm model='tpm-crb'><backend type='emulator' version='2.0'/></tpm></devices>|\" /tmp/vm36.xml
         virsh define /tmp/vm36.xml
         rm /tmp/vm36.xml
         mkdir -p {state}
         head -c 6000 /dev/urandom >{state}/tpm2-00.permall
         touch {state}/.lock"
    );
    devstack.sh("kvm1", &make);
    let file = format!("{state}/tpm2-00.permall");
    let before = devstack.sha256("kvm1", &file);
    for to in ["kvm2", "kvm1"] {
        moved(&devstack, &guest, to, &[]);
        guest.assert_only_on(to, "shut off");
        assert_eq!(devstack.sha256(to, &file), before);
        confirmed(&devstack, &guest);
        let left = devstack.sh(
            other(to),
            &format!("find {state} -type f -name 'tpm2*' || :"),
        );
        assert_eq!(left, "");
    }
    devstack.sh("kvm1", &format!("rm -r {state}"));
}

// ---- confirm and revert

#[test]
fn what_a_guest_wrote_on_the_destination_is_gone_after_a_revert() {
    let Some(devstack) = Devstack::take() else {
        return;
    };
    let guest = devstack.guest("vm37");
    let before = guest.check();
    moved(&devstack, &guest, "kvm2", &[]);
    let there = assert_runs(&guest, "kvm2", &before);
    let found = count(&there, "disk_found");
    devstack.until("the guest writes", || {
        count(&guest.status(), "disk_written") > found + 20
    });
    reverted(&devstack, &guest);
    let back = assert_runs(&guest, "kvm1", &before);
    assert_eq!(
        count(&back, "disk_found"),
        found,
        "as it left, to the record"
    );
    guest.until_known("kvm1");

    // There is one ending for each.
    let again = devstack.drover(&["instance", "confirm", &guest.name]);
    assert_eq!(again.status.code(), Some(3), "{}", told(&again));
    let again = devstack.drover(&["instance", "revert", &guest.name, "--yes"]);
    assert_eq!(again.status.code(), Some(3), "{}", told(&again));
}

#[test]
fn what_is_confirmed_cannot_be_reverted_also_after_a_restart() {
    let Some(devstack) = Devstack::take() else {
        return;
    };
    let guest = devstack.guest("vm38");
    let before = guest.check();
    moved(&devstack, &guest, "kvm2", &[]);
    devstack.ok("service", &["ctl", "conductor", "kill"]);
    devstack.ok("service", &["kvm1", "agent", "kill"]);
    devstack.ok("service", &["kvm1", "agent", "start"]);
    devstack.ok("service", &["ctl", "conductor", "start"]);
    confirmed(&devstack, &guest);
    let again = devstack.drover(&["instance", "revert", &guest.name, "--yes"]);
    assert_eq!(again.status.code(), Some(3), "{}", told(&again));
    assert_runs(&guest, "kvm2", &before);
    guest.assert_no_trace_on("kvm1");
}

#[test]
fn a_revert_that_keeps_changes_is_a_move_back() {
    let Some(devstack) = Devstack::take() else {
        return;
    };
    let guest = devstack.guest("vm39");
    let before = guest.check();
    moved(&devstack, &guest, "kvm2", &[]);
    let there = assert_runs(&guest, "kvm2", &before);
    let record = devstack.json(&["instance", "revert", &guest.name, "--keep-changes"]);
    assert_eq!(record["status"], "finished", "{record:#}");
    assert_eq!(record["dest_host"], "kvm1", "{record:#}");
    assert_runs(&guest, "kvm1", &there);
    confirmed(&devstack, &guest);
    guest.assert_no_trace_on("kvm2");
}

#[test]
fn bytes_are_as_they_were_after_a_revert() {
    let Some(devstack) = Devstack::take() else {
        return;
    };
    let guest = devstack.guest_with("vm40", &["--off"]);
    let disk = format!("{IMAGES}/vm40.qcow2");
    let before = devstack.sha256("kvm1", &disk);
    moved(&devstack, &guest, "kvm2", &[]);
    devstack.sh(
        "kvm2",
        &format!("qemu-io -f qcow2 -c 'write -q -P 3 0 1M' {disk}"),
    );
    reverted(&devstack, &guest);
    guest.assert_only_on("kvm1", "shut off");
    assert_eq!(devstack.sha256("kvm1", &disk), before);
}

// ---- guests that do not obey

#[test]
fn a_guest_that_does_not_obey_is_stopped_hard_only_with_permission() {
    let Some(devstack) = Devstack::take() else {
        return;
    };
    let guest = devstack.guest_with("vm41", DEAF);
    let before = guest.check();
    let session = guest.session();
    let args = ["vm41", "--to", "kvm2", "--shutdown-timeout", "3s"];
    let end = devstack.start_cold(&args).end();
    assert_eq!(end["end_reason"]["kind"], "stalled", "{end:#}");
    assert_back(&devstack, &guest, &end);
    session.end();
    let after = guest.check();
    assert_eq!(
        after["disk_found"], before["disk_found"],
        "it never restarted"
    );
    assert!(count(&after, "uptime_ms") > count(&before, "uptime_ms"));

    let record = moved(&devstack, &guest, "kvm2", &["--force-stop-after", "5s"]);
    assert!(decided(&record, "stopped hard, as allowed"), "{record:#}");
    assert_runs(&guest, "kvm2", &after);
    confirmed(&devstack, &guest);
}

// ---- what goes wrong on the way

#[test]
fn a_destination_that_runs_full_midway_leaves_the_guest_where_it_was() {
    let Some(devstack) = Devstack::take() else {
        return;
    };
    let guest = devstack.guest_with("vm42", &["--off"]);
    let small = format!("{IMAGES}/small-vm42");
    devstack.sh(
        "kvm1",
        &format!("mkdir {small}; head -c 40M /dev/urandom >{small}/b.raw"),
    );
    attach(&devstack, &guest, &format!("{small}/b.raw"), "raw", "vdb");
    devstack.ok("guest", &[&guest.name, "start"]);
    let mount = format!("mkdir {small}; mount -t tmpfs -o size=64M tmpfs {small}");
    devstack.sh("kvm2", &mount);
    let before = guest.check();
    let mut following = devstack.start_cold(&[&["vm42", "--to", "kvm2"], SLOWLY].concat());
    following.until_copying();
    // It held 64 MiB when it was looked at.
    devstack.sh("kvm2", &format!("fallocate -l 45M {small}/others"));
    let end = following.end();
    devstack.sh(
        "kvm2",
        &format!("ls {small}; umount {small}; rmdir {small}"),
    );
    let why = end["end_reason"]["message"].as_str().unwrap_or_default();
    assert!(why.contains("b.raw") && why.contains("No space"), "{end:#}");
    guest.until_up();
    assert_back(&devstack, &guest, &end);
    assert_runs(&guest, "kvm1", &before);
    devstack.ok("guest", &[&guest.name, "remove"]);
    devstack.sh("kvm1", &format!("rm -r {small}"));
}

/// Cuts a node off in the middle of the copy.
fn cut_off(name: &str, host: &str) {
    let Some(devstack) = Devstack::take() else {
        return;
    };
    let guest = devstack.guest_with(name, DATA);
    let before = guest.check();
    let mut following = devstack.start_cold(&[&[name, "--to", "kvm2"], SLOWLY].concat());
    following.until_copying();
    devstack.ok("link", &[host, "down"]);
    // Until the source has given the connection up.
    let connected = "ss -Htn state established dst 100.100.100.12 | grep -q :49215";
    devstack.until("the connection breaks", || {
        let output = devstack.on("kvm1", &["sh", "-c", connected]);
        !output.status.success()
    });
    devstack.ok("link", &[host, "up"]);
    let end = following.end();
    assert_eq!(end["status"], "finished", "{end:#}");
    assert!(decided(&end, "went on where it stopped"), "{end:#}");
    assert_runs(&guest, "kvm2", &before);
    confirmed(&devstack, &guest);
    guest.assert_no_trace_on("kvm1");
}

#[test]
fn a_source_cut_off_during_the_copy_goes_on_where_it_stopped() {
    cut_off("vm43", "kvm1");
}

#[test]
fn a_destination_cut_off_during_the_copy_goes_on_where_it_stopped() {
    cut_off("vm44", "kvm2");
}

/// Kills a service while the guest shuts down and again during the copy.
fn killed(name: &str, place: &str, service: &str) {
    let Some(devstack) = Devstack::take() else {
        return;
    };
    // It does not obey, which leaves time.
    let guest = devstack.guest_with(name, &[&["--data-mib", "80"], DEAF].concat());
    let before = guest.check();
    let options = ["--to", "kvm2", "--force-stop-after", "3s"];
    let mut following = devstack.start_cold(&[&[name], &options[..], SLOWLY].concat());
    following.until("stopping", |m| {
        m["progress"]["phase"] == "stopping" && m["progress"]["note"].is_string()
    });
    devstack.ok("service", &[place, service, "kill"]);
    devstack.ok("service", &[place, service, "start"]);
    following.until_copying();
    devstack.ok("service", &[place, service, "kill"]);
    devstack.ok("service", &[place, service, "start"]);
    let end = following.end();
    assert_eq!(end["status"], "finished", "{end:#}");
    assert_runs(&guest, "kvm2", &before);
    confirmed(&devstack, &guest);
    guest.assert_no_trace_on("kvm1");
}

#[test]
fn a_source_agent_killed_on_the_way_goes_on() {
    killed("vm45", "kvm1", "agent");
}

#[test]
fn a_destination_agent_killed_on_the_way_goes_on() {
    killed("vm46", "kvm2", "agent");
}

#[test]
fn a_conductor_killed_on_the_way_goes_on() {
    killed("vm47", "ctl", "conductor");
}

#[test]
fn an_abort_during_the_copy_has_the_guest_run_again_where_it_was() {
    let Some(devstack) = Devstack::take() else {
        return;
    };
    let guest = devstack.guest_with("vm48", DATA);
    let before = guest.check();
    let mut following = devstack.start_cold(&[&["vm48", "--to", "kvm2"], SLOWLY].concat());
    following.until_copying();
    devstack.json(&["migration", "abort", &following.id]);
    let end = following.end();
    assert_eq!(end["status"], "cancelled", "{end:#}");
    assert_runs(&guest, "kvm1", &before);
    guest.assert_no_trace_on("kvm2");
    devstack.assert_nothing_kept(id(&end));
}
