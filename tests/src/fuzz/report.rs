//! A node's report, on its way to the record.

use drover_model::{
    guest::PowerState,
    ids::InstanceId,
    node::{HypervisorReport, InstanceReport, NodeReport},
};
use drover_store::{claims, instances::fuzzing};
use serde_json::Value;
use uuid::Uuid;

/// A report is read and written again as the same, all that is in it within bounds;
/// whatever it says of one guest, another in it is read as it is; and what it does to
/// the record is to its own guests.
pub fn report(data: &[u8]) {
    let Ok(report) = serde_json::from_slice::<NodeReport>(data) else {
        return;
    };
    let text = serde_json::to_string(&report).expect("what was read can be written");
    let again: NodeReport = serde_json::from_str(&text).expect("what was written is read");
    // Ratios may lose their last digit once.
    let plain = |report: &NodeReport| NodeReport {
        policy: drover_model::node::AllocationPolicy::default(),
        ..report.clone()
    };
    assert_eq!(plain(&again), plain(&report));
    harms_no_other(data);
    let HypervisorReport::Up {
        inventory,
        instances,
    } = &report.hypervisor
    else {
        return;
    };
    for one in instances {
        assert_eq!(&one.clone().within_bounds(), one);
        assert!(one.unreadable.as_ref().is_none_or(|why| why.len() < 4096));
    }
    if report.problem().is_none() {
        let room = claims::usable(inventory, &report.policy);
        assert!(room.memory_mib <= u64::MAX / 2 || report.policy.ram_allocation_ratio > 1.0);
        fuzzing::report(&report);
    }
}

/// One more guest in the list is read as it is.
fn harms_no_other(data: &[u8]) {
    let Ok(mut said) = serde_json::from_slice::<Value>(data) else {
        return;
    };
    let healthy = healthy();
    let Some(Value::Array(instances)) = said.pointer_mut("/hypervisor/instances") else {
        return;
    };
    let own = healthy.id.to_string();
    let is_own = |id: &str| id.parse() == Ok(healthy.id);
    if instances
        .iter()
        .any(|one| one["id"].as_str().is_some_and(is_own))
    {
        return;
    }
    let count = instances.len();
    instances.push(serde_json::to_value(&healthy).expect("it can be written"));
    let Ok(report) = serde_json::from_value::<NodeReport>(said) else {
        return;
    };
    let HypervisorReport::Up { instances, .. } = &report.hypervisor else {
        // Nothing at all is known of such a hypervisor.
        return;
    };
    let read = instances.iter().find(|one| one.id == healthy.id);
    assert_eq!(read, Some(&healthy), "{own} after {count} others");
    assert!(instances.len() <= count + 1);
}

fn healthy() -> InstanceReport {
    let id = InstanceId(Uuid::from_u128(0x8ea1_0001));
    InstanceReport {
        power_state: PowerState::Paused,
        vcpus: 2,
        memory_mib: 512,
        disk_bytes: 1 << 30,
        generation: 3,
        project: "alpha".to_owned(),
        unreadable: None,
        ..InstanceReport::unreadable(id, "healthy", "")
    }
}
