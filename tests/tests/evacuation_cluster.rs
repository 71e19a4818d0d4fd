//! Evacuation of real nodes that lost their power or their network, and what
//! becomes of their guests when they come back. No guest ever runs twice.

use drover_tests::devstack::{Devstack, Guest, Party, told};
use serde_json::Value;

fn item<'a>(operation: &'a Value, name: &str) -> &'a Value {
    let all = operation["items"].as_array().into_iter().flatten();
    let mut named = all.filter(|item| item["name"] == name);
    named
        .next()
        .unwrap_or_else(|| panic!("no {name}: {operation:#}"))
}

fn count(account: &Value, what: &str) -> u64 {
    account[what]
        .as_u64()
        .unwrap_or_else(|| panic!("{account}"))
}

/// It was started on another node, once, and has what it had heard to be
/// written, with nobody else writing.
fn assert_evacuated(guest: &Guest<'_>, operation: &Value, before: &Value) -> String {
    let item = item(operation, &guest.name);
    assert_eq!(item["state"], "moved", "{operation:#}");
    guest.until_up();
    let node = guest.node();
    assert_eq!(item["host"], node.as_str(), "{operation:#}");
    assert_ne!(node, "kvm3");
    let after = guest.check();
    assert!(
        count(&after, "disk_found") >= count(before, "disk_written"),
        "before {before}, after {after}"
    );
    node
}

/// A node that comes back gives up what lives elsewhere, and that is unharmed.
fn assert_given_up(devstack: &Devstack, guests: &[&Guest<'_>]) {
    for guest in guests {
        let what = format!("kvm3 gives {} up", guest.name);
        devstack.until(&what, || guest.state_on("kvm3").is_none());
        let node = guest.node();
        guest.assert_only_on(&node, "running");
        guest.check();
    }
}

fn down(devstack: &Devstack, set: bool) {
    let mut args = vec!["node", "force-down", "kvm3"];
    args.extend((!set).then_some("--unset"));
    devstack.json(&args);
}

#[test]
fn guests_of_a_node_without_power_are_started_elsewhere() {
    let Some(devstack) = Devstack::take_three() else {
        return;
    };
    devstack.ok("fences", &["on"]);
    let apart = ["--anti-affinity", "web"];
    let first = [&apart[..], &["--raw", "--priority", "5"]].concat();
    let party = devstack.party(
        "kvm3",
        &[("shared14", &first), ("shared15", &apart), ("vm76", &[])],
    );
    let shared = ["shared14", "shared15"].map(|name| party.get(name));
    devstack.until_kept("kvm3", &["shared14", "shared15"]);
    let before = shared.map(Guest::check);
    let generations = shared.map(|guest| guest.generation_on("kvm3"));
    let lookout = devstack.lookout();

    devstack.ok("power", &["kvm3", "off"]);
    down(&devstack, true);
    let end = devstack.operation(1, &["evacuate", "kvm3"]);
    assert_eq!(end["status"], "incomplete", "{end:#}");
    assert_eq!(end["evidence"]["fence"]["fence"], "off", "{end:#}");
    assert_eq!(end["items"][0]["name"], "shared14", "{end:#}");
    let nodes: Vec<String> = shared
        .iter()
        .zip(&before)
        .map(|(guest, before)| assert_evacuated(guest, &end, before))
        .collect();
    assert_ne!(nodes[0], nodes[1], "they are to be apart");
    for ((guest, node), before) in shared.iter().zip(&nodes).zip(generations) {
        assert!(guest.generation_on(node) > before, "{}", guest.name);
    }
    let stays = item(&end, "vm76");
    assert_eq!(stays["state"], "stays", "{end:#}");
    let why = stays["reason"].as_str().unwrap_or_default();
    assert!(why.contains("vm76.qcow2"), "{end:#}");

    devstack.ok("power", &["kvm3", "on"]);
    down(&devstack, false);
    assert_given_up(&devstack, &shared);
    party.get("vm76").assert_only_on("kvm3", "shut off");
    lookout.end();
}

/// The guests of a node that is only cut off run on.
fn assert_run_on(party: &Party<'_>) {
    for guest in party.iter() {
        guest.assert_only_on("kvm3", "running");
    }
}

#[test]
fn a_node_that_is_cut_off_is_evacuated_only_with_a_fence() {
    let Some(devstack) = Devstack::take_three() else {
        return;
    };
    devstack.ok("fences", &["off"]);
    let party = devstack.party("kvm3", &[("shared16", &["--raw"])]);
    let guest = party.get("shared16");
    devstack.until_kept("kvm3", &["shared16"]);
    let lookout = devstack.lookout();

    devstack.ok("link", &["kvm3", "down"]);
    down(&devstack, true);
    let refused = devstack.drover(&["node", "evacuate", "kvm3"]);
    assert_eq!(refused.status.code(), Some(3), "{}", told(&refused));
    assert!(told(&refused).contains("not_fenced"), "{}", told(&refused));
    assert_run_on(&party);

    // Refused, it is the node's still when that comes back.
    devstack.ok("link", &["kvm3", "up"]);
    down(&devstack, false);
    guest.until_known("kvm3");
    let before = guest.check();
    assert_run_on(&party);

    devstack.ok("link", &["kvm3", "down"]);
    down(&devstack, true);
    devstack.ok("fences", &["on"]);
    let end = devstack.operation(0, &["evacuate", "kvm3"]);
    assert_eq!(end["status"], "completed", "{end:#}");
    assert_evacuated(guest, &end, &before);

    // It starts again without a network: nothing of it runs before it has asked.
    devstack.ok("power", &["kvm3", "on"]);
    assert_eq!(guest.state_on("kvm3").as_deref(), Some("shut off"));
    devstack.ok("link", &["kvm3", "up"]);
    down(&devstack, false);
    assert_given_up(&devstack, &[guest]);
    lookout.end();
}
