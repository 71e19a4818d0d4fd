//! Reports of which something cannot be taken in.

use serde_json::{Value, json};

use super::*;

const ID: &str = "00000000-0000-0000-0000-000000000001";
const OTHER: &str = "00000000-0000-0000-0000-000000000002";

fn entry(id: &str) -> Value {
    json!({
        "id": id, "name": "vm", "project": "demo", "generation": 2, "power_state": "shutdown",
        "incoming": false, "vcpus": 2, "memory_mib": 1024, "disk_bytes": 5, "migration": null,
    })
}

fn with(id: &str, key: &str, value: Value) -> Value {
    let mut entry = entry(id);
    entry[key] = value;
    entry
}

fn read(instances: &[Value]) -> Vec<InstanceReport> {
    let report: HypervisorReport = serde_json::from_value(json!({
        "state": "up", "instances": instances,
        "inventory": {
            "hypervisor_type": "QEMU", "hypervisor_version": 1, "libvirt_version": 1,
            "arch": "x86_64", "cpu_model": "", "kvm": true, "vcpus": 4, "memory_mib": 4096,
            "disk_bytes": 1, "disk_free_bytes": 1,
        },
    }))
    .unwrap();
    match report {
        HypervisorReport::Up { instances, .. } => instances,
        HypervisorReport::Down { reason } => panic!("{reason}"),
    }
}

#[test]
fn one_entry_that_cannot_be_taken_in_costs_no_other_its_place() {
    let odd = [
        with(ID, "disk_bytes", json!(1_200_u64 << 40)),
        with(ID, "vcpus", json!(1_u64 << 60)),
        with(ID, "vcpus", json!(60_000)),
        with(ID, "memory_mib", json!(u64::MAX)),
        with(ID, "generation", json!(u64::MAX)),
        with(ID, "name", json!("x".repeat(10_000))),
        with(ID, "project", json!("x".repeat(10_000))),
        with(ID, "power_state", json!("x".repeat(100))),
        with(ID, "power_state", json!(7)),
        with(ID, "memory_mib", json!(-1)),
        with(ID, "wishes", json!("none")),
        with(ID, "usage", json!(3)),
        with(ID, "name", json!(null)),
    ];
    for one in odd {
        let found = read(&[one.clone(), entry(OTHER)]);
        assert_eq!(found.len(), 2, "{one}");
        assert_eq!(found[0].id.to_string(), ID);
        let reason = found[0].unreadable.as_deref().unwrap_or_default();
        assert!(!reason.is_empty() && reason.len() < 600, "{one}: {reason}");
        assert!(found[0].name.len() <= 255);
        assert_eq!(found[1].unreadable, None);
        // What is readable of it is known all the same.
        assert!(found[0].vcpus == 2 || found[0].memory_mib == 1024);
    }
}

#[test]
fn a_state_that_is_not_known_is_kept_and_counts_as_running() {
    let found = read(&[with(ID, "power_state", json!("hibernating"))]);
    assert!(found[0].power_state.is_active());
    assert_eq!(found[0].unreadable, None);
    let said = serde_json::to_value(found[0].power_state).unwrap();
    assert_eq!(said, json!("hibernating"));
    let known = read(&[with(ID, "vcpus", json!(-1))]);
    assert_eq!(known[0].power_state, PowerState::Shutdown);
}

#[test]
fn an_entry_without_a_uuid_is_listed_by_its_name_and_a_double_one_once() {
    let found = read(&[
        with("no uuid", "name", json!("web")),
        json!(7),
        entry(ID),
        entry(ID),
    ]);
    assert_eq!(found.len(), 3);
    assert_eq!(
        (found[0].id, found[0].name.as_str()),
        (InstanceId::NONE, "web")
    );
    assert!(found[..2].iter().all(|one| one.unreadable.is_some()));
    assert!(
        found[2]
            .unreadable
            .as_ref()
            .is_some_and(|r| r.contains("twice"))
    );
}

#[test]
fn a_field_or_a_state_of_a_newer_agent_is_no_end_of_its_node() {
    let found = read(&[with(ID, "flavour", json!({"of": "tomorrow"}))]);
    assert_eq!(found[0].unreadable, None);
    let report: NodeReport = serde_json::from_value(json!({
        "host": "kvm1", "agent_version": "9.9", "agent_started_ms": 1, "sequence": 1,
        "clock_ms": 1, "hypervisor": {"state": "resting"},
        "endpoint": {"address": "a", "libvirt_uri": "b", "libvirt_port": 1},
        "policy": {"cpu_allocation_ratio": 1.0, "ram_allocation_ratio": 1.0, "reserved_memory_mib": 0},
    }))
    .unwrap();
    assert!(matches!(report.hypervisor, HypervisorReport::Down { .. }));
}
