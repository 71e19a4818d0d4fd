//! What several unit tests need.

use drover_model::{
    ids::{InstanceId, MigrationId},
    migration::{Migration, Way},
    node::{AllocationPolicy, Endpoint, HypervisorReport, NodeReport},
};
use drover_store::{hearing::AgentState, nodes::NodeRow};
use uuid::Uuid;

/// An open node that was heard of then, whose libvirt is down.
pub(crate) fn node_row(host: &str, heard_at_ms: u64) -> NodeRow {
    NodeRow {
        report: NodeReport {
            host: host.parse().unwrap(),
            agent_version: String::new(),
            agent_started_ms: 1,
            incarnation: 0,
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
        silent_ms: None,
        agent: AgentState::default(),
    }
}

/// A migration from kvm1 to kvm2 that was just accepted.
pub(crate) fn migration() -> Migration {
    let instance = InstanceId(Uuid::from_u128(7));
    Migration {
        id: 1,
        uuid: MigrationId(Uuid::from_u128(1)),
        instance_name: "vm1".into(),
        project_id: "demo".into(),
        owner: "ctl".into(),
        version: 1,
        ..Migration::new(instance, "kvm1".parse().unwrap(), Way::default(), 0)
    }
}
