//! Rows of the record as the answers that callers get.

use drover_model::{
    api::conductor::{Instance, Node},
    evidence::AgentLost,
    guest::PowerState,
    migration::{Migration, MigrationStatus, Way},
    node::HypervisorReport,
};
use drover_store::{claims::Usage, instances::InstanceRow, nodes::NodeRow};

use crate::checks::{self, Liveness};

/// An instance, given the unfinished migrations.
pub(crate) fn instance(row: &InstanceRow, active: &[Migration]) -> Instance {
    let moving = active.iter().find(|m| m.instance_uuid == row.id);
    Instance {
        uuid: row.id,
        name: row.name.clone(),
        project_id: row.project.clone(),
        host: row.host.clone(),
        power_state: row.power_state,
        vm_state: vm_state(row, moving).to_owned(),
        task_state: moving.and_then(task_state).map(str::to_owned),
        vcpus: row.vcpus,
        memory_mb: row.memory_mib,
        disk_bytes: row.disk_bytes,
        generation: row.generation,
        migration: moving.map(|m| m.uuid),
        seen_at_ms: row.missing_since_ms.unwrap_or(row.changed_at_ms),
        unreadable: row.unreadable.clone(),
        other_copy: row.other_copy(),
        lost: row.is_lost().then(|| checks::lost(row)),
    }
}

fn vm_state(row: &InstanceRow, moving: Option<&Migration>) -> &'static str {
    match row.power_state {
        _ if row.missing_since_ms.is_some() && moving.is_none() => "unknown",
        // Nova's word for what waits to be confirmed or reverted.
        _ if moving.is_some_and(|m| m.status == MigrationStatus::Finished) => "resized",
        PowerState::Running => "active",
        PowerState::Paused => "paused",
        PowerState::Suspended => "suspended",
        PowerState::Shutdown => "stopped",
        PowerState::Crashed => "error",
        PowerState::Other(_) => "unknown",
    }
}

fn task_state(m: &Migration) -> Option<&'static str> {
    use MigrationStatus as S;
    match (&m.way, m.status) {
        (Way::Live(_), _) => Some("migrating"),
        (Way::Transfer(_), _) => Some("transferring"),
        // Nova's words while it evacuates.
        (Way::Evacuation(_), S::Done) => Some("rebuild_spawning"),
        (Way::Evacuation(_), _) => Some("rebuilding"),
        (Way::Cold(_), S::Finished) => None,
        (Way::Cold(_), S::Reverting) => Some("resize_reverting"),
        (Way::Cold(_), S::Confirming) => Some("resize_confirming"),
        (Way::Cold(_), S::Migrating) => Some("resize_migrating"),
        (Way::Cold(_), S::PostMigrating) => Some("resize_finish"),
        (Way::Cold(_), _) => Some("resize_prep"),
    }
}

/// A node, with its room.
pub(crate) fn node(
    row: &NodeRow,
    usage: &Usage,
    agent_lost: Option<AgentLost>,
    live: Liveness,
) -> Node {
    let report = &row.report;
    let signed = |ms: u64| i64::try_from(ms).unwrap_or(i64::MAX);
    let by_report = signed(report.clock_ms) - signed(row.heard_at_ms);
    Node {
        host: report.host.clone(),
        enabled: row.enabled,
        disabled_reason: row.disabled_reason.clone(),
        up: live.is_up(row),
        forced_down: row.forced_down,
        heard_at_ms: row.heard_at_ms,
        report_age_ms: live.silent_ms(row),
        clock_offset_ms: row.agent.clock_offset_ms.unwrap_or(by_report),
        incarnation: row.agent.incarnation,
        refusal: row.agent.refusal.clone(),
        speaks: row.agent.speaks.clone(),
        version_mismatch: row.agent.mismatch.as_ref().map(ToString::to_string),
        vcpus_used: usage.used.vcpus,
        memory_used_mib: usage.used.memory_mib,
        disk_claimed_bytes: usage.used.disk_bytes,
        vcpus_usable: usage.usable.vcpus,
        memory_usable_mib: usage.usable.memory_mib,
        instances: match &report.hypervisor {
            HypervisorReport::Up { instances, .. } => Some(instances.len() as u64),
            HypervisorReport::Down { .. } => None,
        },
        // It may have been heard of since it was looked at last.
        agent_lost: agent_lost.filter(|_| live.silent_ms(row) > live.down_after_ms),
        report: report.clone(),
    }
}
