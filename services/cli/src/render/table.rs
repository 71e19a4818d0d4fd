//! Lists as tables: one line each, columns by two blanks, no lines drawn, so
//! that they read well and cut well.

use comfy_table::{Table, presets::NOTHING};
use drover_model::{
    api::conductor::{Instance, Node},
    guest::PowerState,
    migration::{Migration, MigrationStatus, Phase, Way},
    node::HypervisorReport,
    operation::{Operation, OperationStatus, Task},
};

use super::{
    clean,
    describe::kind,
    progress::Shown,
    units::{ODD_CLOCK_MS, bytes, mib, moment, rate, share, span, version},
};

/// What stands where there is nothing.
pub const NOTHING_HERE: &str = "-";

/// A table of texts, cleaned.
pub fn grid(header: &[&str], rows: impl IntoIterator<Item = Vec<String>>) -> String {
    let mut table = Table::new();
    table.load_style(NOTHING).set_header(header.iter().copied());
    for row in rows {
        table.add_row(row.iter().map(|cell| clean(cell)));
    }
    for column in table.column_iter_mut() {
        column.set_padding((0, 2));
    }
    table.trim_fmt()
}

/// Nodes, with what operations make of them, as [`busy`] tells.
pub fn nodes(nodes: &[Node], operations: &[Operation]) -> String {
    if nodes.is_empty() {
        return "no nodes: no agent has reported yet; `drover doctor` tells why".to_owned();
    }
    let header = [
        "HOST",
        "STATE",
        "PLACING",
        "OPERATION",
        "INSTANCES",
        "VCPUS",
        "MEMORY",
        "DISK FREE",
        "LIBVIRT",
        "QEMU",
        "HEARD",
        "REASON",
    ];
    grid(&header, nodes.iter().map(|n| node_row(n, operations)))
}

/// What an operation makes of a node, with its number: `draining (4)`; *drained*
/// as long as the node stays disabled. Operations are given newest first.
pub fn busy(node: &Node, operations: &[Operation]) -> Option<String> {
    let newest = operations
        .iter()
        .find(|o| o.task.host() == Some(&node.host));
    let o = newest?;
    let is_over = o.status.is_final();
    let word = match &o.task {
        Task::Drain(_) if !is_over => "draining",
        Task::Drain(_) if o.status == OperationStatus::Completed && !node.enabled => "drained",
        Task::Restore(_) if !is_over => "restoring",
        Task::Evacuate(_) if !is_over => "evacuating",
        Task::Evacuate(_) if o.status == OperationStatus::Completed && !node.up => "evacuated",
        _ => return None,
    };
    Some(format!("{word} ({})", o.id))
}

/// Whether a node is heard of (and of a version with which one can speak), declared down, or silent without being known to be
/// dead.
pub fn state(node: &Node) -> &'static str {
    match (node.forced_down, node.up) {
        (true, _) => "down (declared)",
        (false, true) if node.version_mismatch.is_some() => "up (version)",
        (false, true) => "up",
        (false, false) if node.agent_lost.is_some() => "agent lost",
        (false, false) => "down",
    }
}

fn node_row(node: &Node, operations: &[Operation]) -> Vec<String> {
    let (disk, libvirt, qemu) = match &node.report.hypervisor {
        HypervisorReport::Up { inventory, .. } => (
            bytes(inventory.disk_free_bytes),
            version(inventory.libvirt_version),
            version(inventory.hypervisor_version),
        ),
        HypervisorReport::Down { .. } => (nothing(), "down".to_owned(), nothing()),
    };
    vec![
        node.host.to_string(),
        state(node).to_owned(),
        placing(node).to_owned(),
        busy(node, operations).unwrap_or_else(nothing),
        node.instances.map_or_else(nothing, |n| n.to_string()),
        format!("{}/{}", node.vcpus_used, node.vcpus_usable),
        share(node.memory_used_mib << 20, node.memory_usable_mib << 20),
        disk,
        libvirt,
        qemu,
        heard(node),
        node.disabled_reason.clone().unwrap_or_else(nothing),
    ]
}

/// How long ago a node was heard of, and its clock if that is off.
fn heard(node: &Node) -> String {
    let ago = format!("{} ago", span(node.report_age_ms));
    let off = node.clock_offset_ms.unsigned_abs();
    if off <= ODD_CLOCK_MS {
        return ago;
    }
    let sign = if node.clock_offset_ms < 0 { '-' } else { '+' };
    format!("{ago}, clock {sign}{}", span(off))
}

/// Whether a node takes instances, in a word.
pub fn placing(node: &Node) -> &'static str {
    if node.enabled { "enabled" } else { "disabled" }
}

/// Instances.
pub fn instances(instances: &[Instance]) -> String {
    if instances.is_empty() {
        return "no instances".to_owned();
    }
    let header = [
        "NAME", "UUID", "HOST", "STATE", "TASK", "VCPUS", "MEMORY", "DISK", "PROJECT",
    ];
    let row = |i: &Instance| {
        vec![
            i.name.clone(),
            i.uuid.to_string(),
            i.host.to_string(),
            match i.lost {
                Some(_) => "lost".to_owned(),
                None => power(i.power_state),
            },
            i.task_state.clone().unwrap_or_else(nothing),
            i.vcpus.to_string(),
            mib(i.memory_mb),
            bytes(i.disk_bytes),
            i.project_id.clone(),
        ]
    };
    grid(&header, instances.iter().map(row))
}

/// A power state in a word.
pub fn power(state: PowerState) -> String {
    let word = match &state {
        PowerState::Other(word) => word.as_str(),
        PowerState::Running => "running",
        PowerState::Paused => "paused",
        PowerState::Shutdown => "shutdown",
        PowerState::Crashed => "crashed",
        PowerState::Suspended => "suspended",
    };
    word.to_owned()
}

/// Migrations.
pub fn migrations(migrations: &[Migration]) -> String {
    if migrations.is_empty() {
        return "no migrations".to_owned();
    }
    let mut header = vec![
        "ID", "INSTANCE", "KIND", "FROM", "TO", "STATUS", "PHASE", "%", "MOVED", "RATE", "DIRTY",
        "ETA", "DOWNTIME", "TIME", "ACCEPTED", "REASON",
    ];
    // Most are nobody's but their own.
    let has_operations = migrations.iter().any(|m| m.operation.is_some());
    header.extend(has_operations.then_some("OPERATION"));
    let row = |m| {
        let mut row = migration_row(m);
        row.extend(has_operations.then(|| operation(m)));
        row
    };
    grid(&header, migrations.iter().map(row))
}

/// So much of an operation's UUID names it: it begins with the time.
const SHORT_UUID: usize = 13;

fn operation(m: &Migration) -> String {
    let uuid = m.operation.map(|id| id.to_string());
    uuid.map_or_else(nothing, |uuid| uuid.chars().take(SHORT_UUID).collect())
}

fn migration_row(m: &Migration) -> Vec<String> {
    let shown = Shown::of(m);
    let over = m.status.rests();
    let running = |text: Option<String>| text.filter(|_| !over).unwrap_or_else(nothing);
    let measured = m.downtime_ms.map(span);
    let (from, to) = ends(m);
    vec![
        m.id.to_string(),
        m.instance_name.clone(),
        kind(m).to_owned(),
        from,
        to,
        m.status.to_string(),
        running(phase(m)),
        shown.percent.to_string(),
        share(shown.moved(), shown.total()),
        running(some_rate(m.progress.rate_bytes_s)),
        running(some_rate(m.progress.dirty_rate_bytes_s)),
        running(m.progress.eta_ms.map(span)),
        measured.unwrap_or_else(|| running(expected(m))),
        span(m.total_time_ms()),
        moment(m.created_at_ms),
        reason(m).unwrap_or_else(nothing),
    ]
}

/// From where to where; a transfer leads from project to project.
fn ends(m: &Migration) -> (String, String) {
    let to = m.dest_host.as_ref();
    match &m.way {
        Way::Live(_) | Way::Cold(_) | Way::Evacuation(_) => (
            m.source_host.to_string(),
            to.map_or_else(nothing, ToString::to_string),
        ),
        Way::Transfer(transfer) => (
            format!("project {}", m.project_id),
            format!("project {}", transfer.project),
        ),
    }
}

/// The phase; none once the move is done, whatever is still made of it.
fn phase(m: &Migration) -> Option<String> {
    let phase = m.progress.phase;
    (phase != Phase::Done).then(|| phase.as_str().to_owned())
}

fn some_rate(bytes_s: u64) -> Option<String> {
    (bytes_s > 0).then(|| rate(bytes_s))
}

fn expected(m: &Migration) -> Option<String> {
    let expected = m.progress.expected_downtime_ms?;
    Some(format!("~{}", span(expected)))
}

/// Why it is as it is: why it ended, or why it takes long.
fn reason(m: &Migration) -> Option<String> {
    match (&m.end_reason, m.status) {
        (Some(reason), _) => Some(reason.to_string()),
        (None, MigrationStatus::Finished) => Some("to be confirmed or reverted".to_owned()),
        (None, _) => m.progress.note.clone(),
    }
}

pub(super) fn nothing() -> String {
    NOTHING_HERE.to_owned()
}

#[cfg(test)]
mod tests {
    use drover_model::migration::TransferMode;

    use super::*;
    use crate::samples;

    #[test]
    fn nodes_look_so() {
        let mut down = samples::node("kvm2");
        down.up = false;
        down.enabled = false;
        down.disabled_reason = Some("new\x1b[2J disks".to_owned());
        down.instances = None;
        down.report_age_ms = 95_000;
        down.report.hypervisor = HypervisorReport::Down {
            reason: "no socket".to_owned(),
        };
        let expected = "\
HOST  STATE  PLACING   OPERATION  INSTANCES  VCPUS  MEMORY       DISK FREE  LIBVIRT  QEMU   HEARD           REASON
kvm1  up     enabled   -          2          2/16   0.2/7.5 GiB  80 GiB     9.0.0    7.2.0  1.2 s ago       -
kvm2  down   disabled  -          -          2/16   0.2/7.5 GiB  -          down     -      1 min 35 s ago  new[2J disks";
        let table = nodes(&[samples::node("kvm1"), down], &[]);
        assert_eq!(table, expected, "\n{table}");
        assert!(nodes(&[], &[]).contains("drover doctor"));
    }

    #[test]
    fn draining_is_told_apart_from_drained() {
        let mut node = samples::node("kvm1");
        node.enabled = false;
        let of = |o: Operation| [o];
        let busy = |node: &Node, o: Operation| busy(node, &of(o));
        let drain = samples::drain();
        assert_eq!(busy(&node, drain.clone()).unwrap(), "draining (4)");
        let drained = samples::drained();
        assert_eq!(busy(&node, drained.clone()).unwrap(), "drained (4)");
        let mut failed = drained.clone();
        failed.status = OperationStatus::Incomplete;
        assert_eq!(busy(&node, failed), None);
        assert_eq!(busy(&samples::node("kvm2"), drain), None);
        node.enabled = true;
        assert_eq!(busy(&node, drained), None, "it was opened since");
        node.up = false;
        assert_eq!(state(&node), "down");
        node.agent_lost = Some(samples::agent_lost());
        assert_eq!(state(&node), "agent lost");
        node.forced_down = true;
        assert_eq!(state(&node), "down (declared)");
    }

    #[test]
    fn migrations_of_an_operation_name_it() {
        let mut m = samples::completed(samples::migration());
        m.operation = Some(samples::drain().uuid);
        let table = migrations(&[m, samples::migration()]);
        let ends: Vec<&str> = table
            .lines()
            .map(|l| l.rsplit("  ").next().unwrap())
            .collect();
        assert_eq!(ends, ["OPERATION", "01997777-0000", "-"], "{table}");
    }

    #[test]
    fn instances_look_so() {
        let table = instances(&[samples::instance("demo-1")]);
        let expected = "\
NAME    UUID                                  HOST  STATE    TASK  VCPUS  MEMORY   DISK   PROJECT
demo-1  11111111-2222-4333-8444-555555555555  kvm1  running  -     1      128 MiB  1 GiB  default";
        assert_eq!(table, expected, "\n{table}");
        assert_eq!(instances(&[]), "no instances");
    }

    #[test]
    fn migrations_look_so() {
        let done = samples::completed(samples::migration());
        let table = migrations(&[
            samples::finished(),
            samples::stopping(),
            samples::running(samples::migration()),
            done,
        ]);
        let expected = "\
ID  INSTANCE  KIND  FROM  TO    STATUS     PHASE     %    MOVED        RATE      DIRTY    ETA    DOWNTIME  TIME    ACCEPTED              REASON
7   demo-1    cold  kvm1  kvm2  finished   -         100  1/1 GiB      -         -        -      14.3 s    21.5 s  2026-11-23 18:46:51Z  to be confirmed or reverted
7   demo-1    cold  kvm1  kvm2  migrating  stopping  0    0/0 B        -         -        -      -         9.0 s   2026-11-23 18:46:51Z  waiting for the guest to shut down: 7 s
7   demo-1    live  kvm1  kvm2  running    memory    61   0.6/1.1 GiB  90 MiB/s  4 MiB/s  1.5 s  ~120 ms   1.0 s   2026-11-23 18:46:51Z  -
7   demo-1    live  kvm1  kvm2  completed  -         100  1.1/1.1 GiB  -         -        -      212 ms    2.1 s   2026-11-23 18:46:51Z  -";
        assert_eq!(table, expected, "\n{table}");
        assert_eq!(migrations(&[]), "no migrations");
    }

    #[test]
    fn a_transfer_leads_from_project_to_project() {
        let m = samples::handed_over(samples::handover(TransferMode::Live));
        let expected = "\
ID  INSTANCE  KIND      FROM             TO            STATUS     PHASE  %    MOVED    RATE  DIRTY  ETA  DOWNTIME  TIME   ACCEPTED              REASON
7   demo-1    transfer  project default  project blue  completed  -      100  1/1 GiB  -     -      -    34 ms     2.1 s  2026-11-23 18:46:51Z  -";
        let table = migrations(&[m]);
        assert_eq!(table, expected, "\n{table}");
    }
}
