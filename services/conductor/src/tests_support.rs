//! What several unit tests need.

use drover_model::{
    ids::{InstanceId, MigrationId},
    migration::{Migration, MigrationStatus, Progress, Requester, Way},
    node::{AllocationPolicy, Endpoint, HypervisorReport, NodeReport},
};
use drover_store::nodes::NodeRow;
use uuid::Uuid;

/// An open node that was heard of then, whose libvirt is down.
pub(crate) fn node_row(host: &str, heard_at_ms: u64) -> NodeRow {
    NodeRow {
        report: NodeReport {
            host: host.parse().unwrap(),
            agent_version: String::new(),
            agent_started_ms: 1,
            sequence: 1,
            clock_ms: heard_at_ms,
            endpoint: Endpoint {
                address: host.to_owned(),
                libvirt_uri: String::new(),
                libvirt_port: 16_509,
            },
            policy: AllocationPolicy::default(),
            hypervisor: HypervisorReport::Down {
                reason: "not asked".to_owned(),
            },
        },
        heard_at_ms,
        enabled: true,
        disabled_reason: None,
        forced_down: false,
    }
}

/// A migration from kvm1 to kvm2 that was just accepted.
pub(crate) fn migration() -> Migration {
    Migration {
        id: 1,
        uuid: MigrationId(Uuid::from_u128(1)),
        instance_uuid: InstanceId(Uuid::from_u128(7)),
        instance_name: "vm1".into(),
        project_id: "demo".into(),
        way: Way::default(),
        status: MigrationStatus::Accepted,
        source_host: "kvm1".parse().unwrap(),
        dest_host: None,
        dest_requested: false,
        step: String::new(),
        step_started_at_ms: 0,
        attempt: 1,
        owner: "ctl".into(),
        requester: Requester::default(),
        consent: None,
        operation: None,
        abort_requested: false,
        force_complete_requested: false,
        ending: None,
        ending_attempt: 0,
        end_reason: None,
        warnings: vec![],
        decisions: vec![],
        timings: vec![],
        progress: Progress::default(),
        downtime_ms: None,
        created_at_ms: 0,
        updated_at_ms: 0,
        finished_at_ms: None,
        deadline_at_ms: None,
        version: 1,
    }
}
