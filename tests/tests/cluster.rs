//! Live migration of real guests between real libvirtds, asked for by the
//! operator's command, with what can go wrong going wrong for real.

use drover_tests::devstack::{Devstack, Guest, told};
use serde_json::Value;

/// Slow enough to be caught in the middle: a guest's memory takes some seconds.
const SLOWLY: &[&str] = &["--bandwidth", "12"];

fn migrate<'a>(guest: &'a Guest<'_>, to: &'a str) -> [&'a str; 3] {
    [&guest.name, "--to", to]
}

fn there_and_back(name: &str) {
    let Some(devstack) = Devstack::take() else {
        return;
    };
    let guest = devstack.guest(name);
    let before = guest.check();
    let session = guest.session();
    for (from, to) in [("kvm1", "kvm2"), ("kvm2", "kvm1")] {
        let args = [
            &["instance", "migrate"],
            &migrate(&guest, to)[..],
            &["--live", "--wait"],
        ]
        .concat();
        let output = devstack.drover(&args);
        assert!(output.status.success(), "{}", told(&output));
        assert_eq!(guest.node(), to);
        guest.assert_no_trace_on(from);
        let shown = devstack.json(&["instance", "show", &guest.name]);
        assert_eq!(shown["host"], to);
    }
    session.end();
    let after = guest.check();
    for counter in ["uptime_ms", "mem_rewrites", "disk_verified"] {
        let grew = after[counter].as_u64() > before[counter].as_u64();
        assert!(
            grew,
            "{counter} went from {} to {}",
            before[counter], after[counter]
        );
    }
}

#[test]
fn a_guest_with_a_local_disk_moves_there_and_back() {
    there_and_back("vm21");
}

#[test]
fn a_guest_with_a_shared_disk_moves_there_and_back() {
    there_and_back("shared21");
}

fn codes(checks: &Value) -> Vec<String> {
    let all = checks.as_array().into_iter().flatten();
    all.map(|c| c["code"].as_str().unwrap_or_default().to_owned())
        .collect()
}

/// What a dry run has against a move.
fn failures(devstack: &Devstack, guest: &Guest<'_>, to: &str) -> Vec<String> {
    let id = guest.uuid();
    let args = [
        "instance",
        "migrate",
        &id,
        "--to",
        to,
        "--live",
        "--dry-run",
        "--json",
    ];
    let output = devstack.drover(&args);
    let plan: Value =
        serde_json::from_slice(&output.stdout).unwrap_or_else(|e| panic!("{e}: {}", told(&output)));
    let codes = codes(&plan["failures"]);
    let expected = if codes.is_empty() { 0 } else { 3 };
    assert_eq!(output.status.code(), Some(expected), "{}", told(&output));
    codes
}

#[test]
fn a_destination_that_cannot_take_it_says_all_that_stands_in_the_way() {
    let Some(devstack) = Devstack::take() else {
        return;
    };
    let guest = devstack.guest("vm22");
    assert_eq!(failures(&devstack, &guest, "kvm2"), Vec::<String>::new());
    assert!(failures(&devstack, &guest, "kvm1").contains(&"same_host".to_owned()));
    assert!(failures(&devstack, &guest, "kvm9").contains(&"unknown_host".to_owned()));

    let disk = "/var/lib/libvirt/images/vm22.qcow2";
    devstack.ok("on", &["kvm2", "touch", disk]);
    assert_eq!(failures(&devstack, &guest, "kvm2"), ["disk_exists"]);

    let other = "<domain type='qemu'><name>vm22</name><memory unit='MiB'>16</memory>\
                 <os><type arch='x86_64'>hvm</type></os></domain>";
    let define =
        format!("echo \"{other}\" >/tmp/vm22.xml; virsh define /tmp/vm22.xml; rm /tmp/vm22.xml");
    devstack.ok("on", &["kvm2", "sh", "-c", &define]);
    devstack.ok(
        "on",
        &[
            "ctl", "drover", "node", "disable", "kvm2", "--reason", "a test",
        ],
    );
    let all = failures(&devstack, &guest, "kvm2");
    for code in ["disk_exists", "name_taken", "host_disabled"] {
        assert!(
            all.contains(&code.to_owned()),
            "{code} is missing in {all:?}"
        );
    }
    let id = guest.uuid();
    let refused = devstack.drover(&[
        "instance", "migrate", &id, "--to", "kvm2", "--live", "--wait",
    ]);
    assert_eq!(refused.status.code(), Some(3), "{}", told(&refused));

    devstack.ok("on", &["ctl", "drover", "node", "enable", "kvm2"]);
    devstack.ok("on", &["kvm2", "virsh", "undefine", "vm22"]);
    devstack.ok("on", &["kvm2", "rm", disk]);
    devstack.ok("on", &["kvm1", "virsh", "snapshot-create-as", "vm22", "s1"]);
    assert_eq!(failures(&devstack, &guest, "kvm2"), ["snapshots"]);
    devstack.ok("on", &["kvm1", "virsh", "snapshot-delete", "vm22", "s1"]);
    assert_eq!(failures(&devstack, &guest, "kvm2"), Vec::<String>::new());
    assert_eq!(guest.node(), "kvm1");
    guest.check();
}

#[test]
fn an_abort_under_way_leaves_the_guest_where_it_was() {
    let Some(devstack) = Devstack::take() else {
        return;
    };
    let guest = devstack.guest("vm23");
    let session = guest.session();
    let mut following = devstack.start(&[&migrate(&guest, "kvm2")[..], SLOWLY].concat());
    following.until_sending();
    devstack.json(&["migration", "abort", &following.id]);
    let end = following.end();
    assert_eq!(end["status"], "cancelled", "{end:#}");
    assert_eq!(guest.node(), "kvm1");
    guest.assert_no_trace_on("kvm2");
    session.end();
    guest.check();
}

#[test]
fn a_destination_whose_qemu_dies_midway_leaves_the_guest_where_it_was() {
    let Some(devstack) = Devstack::take() else {
        return;
    };
    let guest = devstack.guest("vm24");
    let session = guest.session();
    let mut following = devstack.start(&[&migrate(&guest, "kvm2")[..], SLOWLY].concat());
    following.until_sending();
    let kill = "kill -9 $(cat /run/libvirt/qemu/vm24.pid)";
    devstack.ok("on", &["kvm2", "sh", "-c", kill]);
    let end = following.end();
    assert_eq!(end["status"], "failed", "{end:#}");
    assert_eq!(guest.node(), "kvm1");
    guest.assert_no_trace_on("kvm2");
    session.end();
    guest.check();
}

/// Kills a service in the middle of a transfer and starts it again.
fn killed_midway(name: &str, place: &str, service: &str) {
    let Some(devstack) = Devstack::take() else {
        return;
    };
    let guest = devstack.guest(name);
    let session = guest.session();
    let mut following = devstack.start(&[&migrate(&guest, "kvm2")[..], SLOWLY].concat());
    following.until_sending();
    devstack.ok("service", &[place, service, "kill"]);
    devstack.ok("service", &[place, service, "start"]);
    let id = following.id.clone();
    drop(following);
    devstack.drover(&["migration", "watch", &id]);
    let end = devstack.json(&["migration", "show", &id]);
    assert_eq!(end["status"], "completed", "{end:#}");
    assert_eq!(guest.node(), "kvm2");
    guest.assert_no_trace_on("kvm1");
    session.end();
    guest.check();
}

#[test]
fn an_agent_killed_during_the_transfer_finds_it_again() {
    killed_midway("vm25", "kvm1", "agent");
}

#[test]
fn the_destinations_agent_killed_during_the_transfer_is_not_missed() {
    killed_midway("vm26", "kvm2", "agent");
}

#[test]
fn a_conductor_killed_during_the_transfer_takes_it_up_again() {
    killed_midway("vm27", "ctl", "conductor");
}

#[test]
fn a_guest_that_outruns_the_link_moves_by_post_copy() {
    let Some(devstack) = Devstack::take() else {
        return;
    };
    let guest = devstack.guest("vm28");
    let session = guest.session();
    let options = ["--post-copy", "--bandwidth", "12"];
    let mut following = devstack.start(&[&migrate(&guest, "kvm2")[..], &options].concat());
    following.until_sending();
    devstack.json(&["migration", "force-complete", &following.id]);
    let end = following.end();
    assert_eq!(end["status"], "completed", "{end:#}");
    assert_eq!(guest.node(), "kvm2");
    session.end();
    guest.check();
}

#[test]
fn a_guest_that_is_made_to_end_stands_still_for_a_moment_whatever_its_bandwidth() {
    let Some(devstack) = Devstack::take() else {
        return;
    };
    let guest = devstack.guest("shared29");
    let session = guest.session();
    let options = ["--bandwidth", "1"];
    let mut following = devstack.start(&[&migrate(&guest, "kvm2")[..], &options].concat());
    following.until_sending();
    devstack.json(&["migration", "force-complete", &following.id]);
    let end = following.end();
    assert_eq!(end["status"], "completed", "{end:#}");
    let downtime_ms = end["downtime_ms"].as_u64();
    assert!(downtime_ms.is_some_and(|ms| ms < 5_000), "{end:#}");
    session.end();
    guest.check();
}
