//! What several unit tests need.

use drover_model::{
    ids::{InstanceId, MigrationId},
    migration::{Migration, Way},
    node::{AllocationPolicy, Endpoint, HypervisorReport, NodeReport},
};
use drover_rpc::{MessagingSettings, RpcClient, memory::MemoryBroker};
use drover_store::{Store, hearing::AgentState, nodes::NodeRow};
use uuid::Uuid;

use crate::{
    agent_client::{AgentClient, CallLimits},
    app::Context,
    clock::Clock,
    config::ConductorSettings,
    left_alone::Left,
    operation::{active::Rounds, definitions::Definitions, fence::Fences, load::Loads},
    plan::Costs,
};

/// What a conductor works with that knows of no node, in virtual time.
pub(crate) async fn context() -> Context {
    let settings = ConductorSettings::default();
    let began = tokio::time::Instant::now();
    let transport = MemoryBroker::default().transport("ctl");
    let client = RpcClient::new(transport, &MessagingSettings::default());
    Context {
        name: "ctl".to_owned(),
        store: Store::in_memory().await.unwrap(),
        agents: AgentClient::new(client, CallLimits::default()),
        clock: Clock::from_fn(move || 1_000_000 + began.elapsed().as_millis() as u64),
        down_after_ms: 30_000,
        confirm_window_ms: 0,
        fences: Fences::default(),
        definitions: Definitions::default(),
        auto_evacuate: settings.auto_evacuate(),
        limits: settings.limits(),
        costs: Costs::default(),
        balance: settings.balance(),
        loads: Loads::new(1000),
        active: Rounds::default(),
        left_alone: Left::default(),
    }
}

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
