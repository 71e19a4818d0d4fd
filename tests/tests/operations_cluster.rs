//! Draining, restoring and balancing real nodes, asked for by the operator's
//! command, with what can go wrong going wrong for real.

use drover_tests::devstack::{Devstack, Party};
use serde_json::Value;

/// Slow enough to be caught in the middle: a guest's memory takes some seconds.
const SLOWLY: &[&str] = &["--bandwidth", "12"];

/// The guest of an operation, or of a plan, by its name.
fn of<'a>(guests: &'a Value, name: &str) -> &'a Value {
    let all = guests.as_array().into_iter().flatten();
    let mut named = all.filter(|guest| guest["name"] == name);
    named
        .next()
        .unwrap_or_else(|| panic!("no {name}: {guests:#}"))
}

/// Where an operation's guest stands.
fn state<'a>(operation: &'a Value, name: &str) -> &'a str {
    let state = of(&operation["items"], name)["state"].as_str();
    state.unwrap_or_else(|| panic!("{operation:#}"))
}

/// Whether an operation moved a guest; one that it found gone already it did not.
fn has_moved(operation: &Value, name: &str) -> bool {
    let items = operation["items"].as_array().into_iter().flatten();
    let mut items = items.filter(|item| item["name"] == name);
    items.any(|item| item["state"] == "moved")
}

fn reason<'a>(operation: &'a Value, name: &str) -> &'a str {
    let reason = of(&operation["items"], name)["reason"].as_str();
    reason.unwrap_or_else(|| panic!("{operation:#}"))
}

/// Every guest runs, once, and its memory and disk are whole.
fn assert_whole(party: &Party<'_>) {
    for guest in party.iter() {
        guest.node();
        guest.check();
    }
}

/// It moved there, and runs there.
fn assert_moved(party: &Party<'_>, operation: &Value, name: &str, away_from: &str) {
    assert_eq!(state(operation, name), "moved", "{operation:#}");
    let item = of(&operation["items"], name);
    let node = party.get(name).node();
    assert_eq!(item["host"], node.as_str(), "{operation:#}");
    assert_ne!(node, away_from);
    party.get(name).assert_only_on(&node, "running");
}

/// Six guests: one is to go first, one outruns a slow link, two cannot move live.
const SIX: &[(&str, &[&str])] = &[
    ("vm81", &[]),
    ("vm82", &[]),
    ("shared11", &["--priority", "9"]),
    (
        "vm83",
        &["--cmdline", "drover.dirty_mib_s=40 drover.mem_mib=48"],
    ),
    ("vm84", &["--tied"]),
    ("shared12", &["--cache", "writeback"]),
];

#[test]
fn a_drain_moves_what_it_can_and_a_restore_brings_it_back() {
    let Some(devstack) = Devstack::take_three() else {
        return;
    };
    let party = devstack.party("kvm3", SIX);
    let sessions = ["vm81", "shared11", "vm83"].map(|name| party.get(name).session());

    let answer = devstack.dry_run(&["drain", "kvm3"]);
    let plan = &answer["plan"];
    assert_eq!(answer["failures"], Value::Array(Vec::new()), "{answer:#}");
    assert_eq!(plan["moves"][0]["name"], "shared11", "{plan:#}");
    for (name, code) in [("vm84", "filesystem"), ("shared12", "disk_cache")] {
        let guest = of(&plan["moves"], name);
        assert_eq!(guest["verdict"]["verdict"], "stays", "{guest:#}");
        let codes = guest["verdict"]["reasons"].as_array();
        let named = |r: &Value| r["code"] == code;
        assert!(codes.is_some_and(|all| all.iter().any(named)), "{guest:#}");
    }
    let node = devstack.json(&["node", "show", "kvm3"]);
    assert_eq!(node["enabled"], true, "a dry run changes nothing: {node:#}");

    let drain = [
        "drain",
        "kvm3",
        "--reason",
        "new disks",
        "--progress-timeout",
        "6s",
    ];
    let end = devstack.operation(1, &[&drain[..], SLOWLY].concat());
    assert_eq!(end["status"], "incomplete", "{end:#}");
    for name in ["vm81", "vm82", "shared11"] {
        assert_moved(&party, &end, name, "kvm3");
    }
    assert_eq!(state(&end, "vm83"), "failed", "{end:#}");
    assert!(!reason(&end, "vm83").is_empty(), "{end:#}");
    for name in ["vm84", "shared12"] {
        assert_eq!(state(&end, name), "stays", "{end:#}");
    }
    for name in ["vm83", "vm84", "shared12"] {
        party.get(name).assert_only_on("kvm3", "running");
    }
    let node = devstack.json(&["node", "show", "kvm3"]);
    assert_eq!(node["enabled"], false, "{node:#}");

    let back = devstack.operation(0, &["restore", "kvm3"]);
    assert_eq!(back["status"], "completed", "{back:#}");
    for guest in party.iter() {
        guest.assert_only_on("kvm3", "running");
    }
    for session in sessions {
        session.end();
    }
    assert_whole(&party);

    // With permission for more; and once more, when nothing is left to do.
    for moved in [5, 0] {
        let end = devstack.operation(1, &["drain", "kvm3", "--mixed"]);
        assert_eq!(end["status"], "incomplete", "{end:#}");
        let count = SIX.iter().filter(|(name, _)| has_moved(&end, name)).count();
        assert_eq!(count, moved, "{end:#}");
        assert_eq!(state(&end, "vm84"), "stays", "{end:#}");
    }
    party.get("shared12").until_up();
    assert_whole(&party);
}

const THREE: &[(&str, &[&str])] = &[("vm86", &[]), ("vm87", &[]), ("shared13", &[])];

#[test]
fn a_drain_called_off_midway_leaves_guests_where_they_run() {
    let Some(devstack) = Devstack::take_three() else {
        return;
    };
    let party = devstack.party("kvm3", THREE);
    let sessions: Vec<_> = party.iter().map(|guest| guest.session()).collect();
    let drain = ["drain", "kvm3", "--max-parallel", "1"];
    let mut following = devstack.begin_operation(&[&drain[..], SLOWLY].concat());
    following.until_one_sends();
    devstack.json(&["operation", "cancel", &following.id]);
    let end = following.operation_end();
    assert_eq!(end["status"], "cancelled", "{end:#}");
    for guest in party.iter() {
        assert_eq!(state(&end, &guest.name), "cancelled", "{end:#}");
        guest.assert_only_on("kvm3", "running");
    }
    for session in sessions {
        session.end();
    }
    assert_whole(&party);
}

#[test]
fn a_drain_goes_on_when_the_conductor_dies_midway() {
    let Some(devstack) = Devstack::take_three() else {
        return;
    };
    let party = devstack.party("kvm3", THREE);
    let sessions: Vec<_> = party.iter().map(|guest| guest.session()).collect();
    let drain = ["drain", "kvm3", "--max-parallel", "2"];
    let mut following = devstack.begin_operation(&[&drain[..], SLOWLY].concat());
    following.until_one_sends();
    devstack.ok("service", &["ctl", "conductor", "kill"]);
    devstack.ok("service", &["ctl", "conductor", "start"]);
    let end = following.operation_end();
    assert_eq!(end["status"], "completed", "{end:#}");
    for guest in party.iter() {
        assert_moved(&party, &end, &guest.name, "kvm3");
    }
    for session in sessions {
        session.end();
    }
    assert_whole(&party);
}

#[test]
fn a_guest_whose_destination_dies_midway_goes_to_the_next() {
    let Some(devstack) = Devstack::take_three() else {
        return;
    };
    let party = devstack.party("kvm3", &[("vm88", &[])]);
    let session = party.get("vm88").session();
    let drain = ["drain", "kvm3", "--progress-timeout", "6s"];
    let mut following = devstack.begin_operation(&[&drain[..], SLOWLY].concat());
    let migration = following.until_one_sends();
    let dies = migration["dest_host"].as_str().expect("it goes somewhere");
    devstack.ok("power", &[dies, "off"]);
    let end = following.operation_end();
    devstack.ok("power", &[dies, "on"]);
    assert_eq!(end["status"], "completed", "{end:#}");
    let tried = &of(&end["items"], "vm88")["tried"];
    assert_eq!(tried[0]["host"], dies, "{end:#}");
    assert_moved(&party, &end, "vm88", dies);
    session.end();
    assert_whole(&party);
    devstack.until("what was made for it there is taken back", || {
        let files = devstack.ok("on", &[dies, "ls", "/var/lib/libvirt/images"]);
        !files.contains("vm88")
    });
}

/// Busy with nothing that has to move.
const BUSY: &[&str] = &[
    "--cmdline",
    "drover.busy_percent=20 drover.dirty_mib_s=0 drover.mem_mib=8 drover.disk_hz=2",
];

#[test]
fn guests_leave_a_node_that_is_busier_than_others() {
    let Some(devstack) = Devstack::take_three() else {
        return;
    };
    let _settings = devstack.settings("balance_duration_s = 10\n");
    let four = ["vm101", "vm102", "vm103", "vm104"].map(|name| (name, BUSY));
    let party = devstack.party("kvm3", &four);
    let balance = ["balance", "--threshold", "15"];
    let moving = |answer: &Value| {
        let moves = answer["plan"]["moves"].as_array().into_iter().flatten();
        moves.filter(|m| m["verdict"]["verdict"] == "moves").count()
    };
    // Its load is known when there were reports for long enough.
    let mut plan = Value::Null;
    devstack.until("there is something to balance", || {
        plan = devstack.dry_run(&balance);
        moving(&plan) > 0
    });
    assert!((1..=2).contains(&moving(&plan)), "{plan:#}");
    for guest in party.iter() {
        guest.assert_only_on("kvm3", "running");
    }

    let end = devstack.operation(0, &balance);
    let spread = |at: usize| end["spread_percent"][at].as_f64().expect("a number");
    assert!(spread(0) > 15.0 && spread(1) <= 15.0, "{end:#}");
    let items = end["items"].as_array().expect("a list");
    assert!((1..=2).contains(&items.len()), "{end:#}");
    for item in items {
        assert_moved(&party, &end, item["name"].as_str().expect("text"), "kvm3");
    }
    assert_whole(&party);

    // What was promised came true, once it is measured again.
    devstack.until("the spread is small", || {
        let answer = devstack.dry_run(&balance);
        let now = answer["plan"]["spread_percent"][0].as_f64();
        moving(&answer) == 0 && now.is_some_and(|now| now <= 15.0)
    });
}
