//! One value told whole: a node, an instance, a migration's record, a plan.

use drover_model::{
    api::conductor::{Instance, Node, Plan},
    ids::InstanceId,
    migration::{
        ColdOptions, Consent, EndReason, Ending, LiveOptions, Migration, MigrationStatus,
        MigrationType, ProjectTransfer, ProofOfDeath, Requester, Transfer, TransferMode, Way,
    },
    node::HypervisorReport,
    operation::Operation,
};

use super::{
    clean,
    operation::evidence,
    outcome::{failed, failures},
    table::{NOTHING_HERE, busy, grid, placing, power, state},
    units::{bytes, mib, moment, rate, share, span, version},
};

/// Names and values, one pair a line.
pub(super) fn facts(pairs: Vec<(&str, String)>) -> String {
    let width = pairs.iter().map(|(name, _)| name.len()).max().unwrap_or(0);
    let line = |(name, value): &(&str, String)| format!("{name:<width$}  {}", clean(value));
    pairs.iter().map(line).collect::<Vec<_>>().join("\n")
}

/// A heading with indented lines under it; nothing if there are none.
pub(crate) fn block(heading: &str, lines: impl IntoIterator<Item = String>) -> String {
    let body: String = lines
        .into_iter()
        .map(|line| format!("\n  {line}"))
        .collect();
    if body.is_empty() {
        body
    } else {
        format!("{heading}{body}")
    }
}

/// The same, below something else.
pub(super) fn section(heading: &str, lines: impl IntoIterator<Item = String>) -> String {
    match block(heading, lines) {
        empty if empty.is_empty() => empty,
        block => format!("\n\n{block}"),
    }
}

pub(super) fn or_nothing<T: ToString>(value: Option<T>) -> String {
    value.map_or_else(|| NOTHING_HERE.to_owned(), |value| value.to_string())
}

/// A node, with what operations make of it.
pub fn node(node: &Node, operations: &[Operation]) -> String {
    let placing = match &node.disabled_reason {
        Some(reason) if !node.enabled => format!("disabled: {reason}"),
        _ => placing(node).to_owned(),
    };
    let report = &node.report;
    let mut pairs = vec![
        ("host", node.host.to_string()),
        ("state", state(node).to_owned()),
        ("placing", placing),
        ("operation", or_nothing(busy(node, operations))),
        ("heard", format!("{} ago", span(node.report_age_ms))),
        (
            "clock",
            format!("{:+} ms to the conductor's", node.clock_offset_ms),
        ),
        (
            "vcpus",
            format!("{}/{}", node.vcpus_used, node.vcpus_usable),
        ),
        (
            "memory",
            share(node.memory_used_mib << 20, node.memory_usable_mib << 20),
        ),
        ("disk claimed", bytes(node.disk_claimed_bytes)),
        ("address", report.endpoint.address.clone()),
        ("libvirt uri", report.endpoint.libvirt_uri.clone()),
        (
            "agent",
            format!(
                "{}, RPC {}, since {}, incarnation {}",
                report.agent_version,
                node.speaks,
                moment(report.agent_started_ms),
                node.incarnation
            ),
        ),
    ];
    let mismatch = node.version_mismatch.clone();
    pairs.extend(mismatch.map(|why| ("versions", why)));
    pairs.extend(node.refusal.clone().map(|reason| ("refused", reason)));
    let mut guests = Vec::new();
    match &report.hypervisor {
        HypervisorReport::Down { reason } => pairs.push(("libvirt", format!("down: {reason}"))),
        HypervisorReport::Up {
            inventory: has,
            instances,
        } => {
            let kvm = if has.kvm {
                "offers KVM"
            } else {
                "offers no KVM"
            };
            let qemu = version(has.hypervisor_version);
            pairs.extend([
                ("libvirt", version(has.libvirt_version)),
                (
                    "hypervisor",
                    format!("{} {qemu}, {kvm}", has.hypervisor_type),
                ),
                (
                    "cpu",
                    format!("{} x {} ({})", has.vcpus, has.cpu_model, has.arch),
                ),
                ("host memory", mib(has.memory_mib)),
                (
                    "disk",
                    format!(
                        "{} free of {}",
                        bytes(has.disk_free_bytes),
                        bytes(has.disk_bytes)
                    ),
                ),
            ]);
            let row = |i: &drover_model::node::InstanceReport| {
                let state = match (&i.unreadable, i.incoming) {
                    (Some(_), _) => "unreadable".to_owned(),
                    (None, true) => "incoming".to_owned(),
                    (None, false) => power(i.power_state),
                };
                vec![
                    i.name.clone(),
                    i.id.to_string(),
                    state.to_owned(),
                    mib(i.memory_mib),
                ]
            };
            if !instances.is_empty() {
                let table = grid(
                    &["NAME", "UUID", "STATE", "MEMORY"],
                    instances.iter().map(row),
                );
                guests.extend(table.lines().map(str::to_owned));
            }
        }
    }
    let lost = node.agent_lost.as_ref();
    let reasons = lost.map(|lost| failures(&lost.reasons)).unwrap_or_default();
    let seen = lost.map(|lost| evidence::lines(&lost.evidence));
    facts(pairs)
        + &section("its agent is lost", reasons)
        + &section("evidence", seen.unwrap_or_default())
        + &section("instances", guests)
}

/// An instance.
pub fn instance(i: &Instance) -> String {
    let mut pairs = vec![
        ("name", i.name.clone()),
        ("uuid", i.uuid.to_string()),
        ("host", i.host.to_string()),
        (
            "state",
            format!("{} ({})", power(i.power_state), i.vm_state),
        ),
        ("task", or_nothing(i.task_state.as_ref())),
        ("migration", or_nothing(i.migration)),
        ("project", i.project_id.clone()),
        ("vcpus", i.vcpus.to_string()),
        ("memory", mib(i.memory_mb)),
        ("disk", bytes(i.disk_bytes)),
        ("generation", i.generation.to_string()),
        ("seen", moment(i.seen_at_ms)),
    ];
    pairs.extend(i.unreadable.clone().map(|reason| ("unreadable", reason)));
    let lost = i.lost.as_ref();
    pairs.extend(lost.map(|why| ("lost", format!("{}: {}", why.message, why.remedy))));
    pairs.extend(i.other_copy.as_ref().map(|other| {
        let both = if other.both_run {
            "TWO COPIES RUN: "
        } else {
            ""
        };
        let state = power(other.power_state);
        let words = format!(
            "{both}{state} on {}, since {}",
            other.host,
            moment(other.since_ms)
        );
        ("other copy", words)
    }));
    facts(pairs)
}

/// A migration in a few words.
pub fn subject(m: &Migration) -> String {
    format!("migration {} of {}", m.id, clean(&m.instance_name))
}

/// What kind a migration is of, in a word.
pub fn kind(m: &Migration) -> &'static str {
    match m.way.migration_type() {
        MigrationType::LiveMigration => "live",
        MigrationType::Migration => "cold",
        MigrationType::ProjectTransfer => "transfer",
        MigrationType::Evacuation => "evacuation",
    }
}

/// What to call it in a sentence: a guest that stays on its node migrates nowhere.
pub fn noun(m: &Migration) -> &'static str {
    match m.way {
        Way::Live(_) | Way::Cold(_) => "migration",
        Way::Transfer(_) => "transfer",
        Way::Evacuation(_) => "evacuation",
    }
}

/// The node a migration leads to, as far as that is known.
pub fn destination(m: &Migration) -> &str {
    m.dest_host.as_ref().map_or("?", |host| host.as_str())
}

/// What can be done with a cold migration that has finished.
pub(super) fn choices(m: &Migration) -> Vec<String> {
    let (id, source) = (handle(&m.instance_name, m.instance_uuid), &m.source_host);
    vec![
        format!("`drover instance confirm {id}`: {source} removes its copy"),
        format!("`drover instance revert {id}`: back to {source}, as it was there"),
        format!("`drover instance revert {id} --keep-changes`: back with all it wrote since"),
    ]
}

/// What to call an instance on a command line: its name, if a shell takes it
/// as it stands.
pub(super) fn handle(name: &str, uuid: InstanceId) -> String {
    let plain = |c: char| c.is_alphanumeric() || matches!(c, '-' | '_' | '.');
    if name.starts_with(char::is_alphanumeric) && name.chars().all(plain) {
        name.to_owned()
    } else {
        uuid.to_string()
    }
}

/// A migration's whole record.
pub fn migration(m: &Migration) -> String {
    let mut pairs = vec![
        ("id", m.id.to_string()),
        ("uuid", m.uuid.to_string()),
        ("type", m.way.migration_type().to_string()),
        (
            "instance",
            format!("{} ({})", m.instance_name, m.instance_uuid),
        ),
    ];
    pairs.extend(parties(m));
    pairs.extend([
        ("status", m.status.to_string()),
        ("phase", m.progress.phase.as_str().to_owned()),
        ("step", step(m)),
        ("ended because", or_nothing(m.end_reason.as_ref())),
        downtime(m),
        ("total time", span(m.total_time_ms())),
    ]);
    pairs.extend(moved(m));
    pairs.push(("options", options(&m.way)));
    pairs.extend(m.operation.map(|id| ("operation", id.to_string())));
    pairs.extend(m.consent.iter().flat_map(consent));
    pairs.extend([
        ("asked", asked(m)),
        ("requester", who(&m.requester)),
        ("conductor", format!("{}, attempt {}", m.owner, m.attempt)),
        ("accepted", moment(m.created_at_ms)),
        ("changed", moment(m.updated_at_ms)),
        ("ended", or_nothing(m.finished_at_ms.map(moment))),
    ]);
    if !m.status.rests() {
        pairs.extend(now(m));
    }
    let steps = m
        .timings
        .iter()
        .map(|t| vec![t.step.clone(), span(t.duration_ms)]);
    let steps: Vec<_> = steps.collect();
    let steps = if steps.is_empty() {
        String::new()
    } else {
        grid(&["STEP", "TOOK"], steps)
    };
    let at = |ms: u64| format!("+{}", span(ms.saturating_sub(m.created_at_ms)));
    let decisions = m.decisions.iter();
    let decisions = decisions.map(|d| format!("{:>9}  {}", at(d.at_ms), clean(&d.text)));
    let checks = match &m.end_reason {
        Some(EndReason::Refused { checks }) => failures(checks),
        _ => Vec::new(),
    };
    let choices = match m.status {
        MigrationStatus::Finished => choices(m),
        _ => Vec::new(),
    };
    facts(pairs)
        + &section("what can be done", choices)
        + &section("failed checks", checks)
        + &section("steps", steps.lines().map(str::to_owned))
        + &section("decisions", decisions)
        + &section("warnings", m.warnings.iter().map(|text| clean(text)))
}

/// Whose the guest is and where, and who or where it goes to.
fn parties(m: &Migration) -> Vec<(&'static str, String)> {
    if let Way::Transfer(transfer) = &m.way {
        let receiver = transfer.project.as_str();
        let change = format!("{} -> {receiver} (giver -> receiver)", m.project_id);
        return vec![("project", change), ("host", m.source_host.to_string())];
    }
    let chosen = if m.dest_requested {
        "named by the caller"
    } else {
        "chosen by the conductor"
    };
    let to = m.dest_host.as_ref();
    let to = to.map(|host| format!("{host} ({chosen})"));
    vec![
        ("project", m.project_id.clone()),
        ("from", m.source_host.to_string()),
        ("to", or_nothing(to)),
    ]
}

/// Who agreed to a transfer, and when.
fn consent(consent: &Consent) -> Vec<(&'static str, String)> {
    let offer = match consent.offer {
        Some(offer) => offer.to_string(),
        None => "none: asked for on behalf of both sides".to_owned(),
    };
    let at = |ms, requester| format!("{} by {}", moment(ms), who(requester));
    let (offered, accepted) = (&consent.offered_by, &consent.accepted_by);
    vec![
        ("offer", offer),
        ("offered", at(consent.offered_at_ms, offered)),
        ("offer accepted", at(consent.accepted_at_ms, accepted)),
    ]
}

/// Whether the guest is stopped for it.
pub(super) fn is_off_meanwhile(way: &Way) -> bool {
    match way {
        Way::Live(_) => false,
        Way::Cold(_) | Way::Evacuation(_) => true,
        Way::Transfer(transfer) => transfer.options.mode == TransferMode::Cold,
    }
}

fn downtime(m: &Migration) -> (&'static str, String) {
    let name = match &m.way {
        way if is_off_meanwhile(way) => "off for",
        Way::Transfer(_) => "network cut",
        _ => "downtime",
    };
    let none = match m.status {
        _ if !is_off_meanwhile(&m.way) => "not measured",
        status if status.has_moved() => "none: it was off before",
        _ => NOTHING_HERE,
    };
    (name, m.downtime_ms.map_or_else(|| none.to_owned(), span))
}

/// What is carried: of any but a live migration, memory is not.
fn moved(m: &Migration) -> Vec<(&'static str, String)> {
    let p = &m.progress;
    let disk = ("disk", transfer(&p.disk));
    match m.way {
        Way::Live(_) => vec![("memory", transfer(&p.memory)), disk],
        Way::Cold(_) | Way::Transfer(_) => vec![disk],
        Way::Evacuation(_) => Vec::new(),
    }
}

/// What only a running migration has.
fn now(m: &Migration) -> Vec<(&'static str, String)> {
    let p = &m.progress;
    let mut pairs = vec![("rate", rate(p.rate_bytes_s))];
    if matches!(m.way, Way::Live(_)) {
        pairs.extend([
            ("dirty rate", rate(p.dirty_rate_bytes_s)),
            ("iteration", p.iteration.to_string()),
        ]);
    }
    pairs.push(("eta", or_nothing(p.eta_ms.map(span))));
    if matches!(m.way, Way::Live(_)) {
        let (expected, allowed) = (p.expected_downtime_ms, p.allowed_downtime_ms);
        pairs.extend([
            ("expected downtime", or_nothing(expected.map(span))),
            ("allowed downtime", or_nothing(allowed.map(span))),
        ]);
    }
    pairs.extend([
        ("note", or_nothing(p.note.as_ref())),
        ("given up at", or_nothing(m.deadline_at_ms.map(moment))),
    ]);
    pairs
}

fn transfer(t: &Transfer) -> String {
    let sent = bytes(t.processed_bytes);
    format!(
        "{}, {sent} sent, {} remaining",
        bytes(t.total_bytes),
        bytes(t.remaining_bytes)
    )
}

fn step(m: &Migration) -> String {
    if m.status.rests() {
        return m.step.clone();
    }
    let since = m.updated_at_ms.saturating_sub(m.step_started_at_ms);
    format!("{}, for {}", m.step, span(since))
}

fn asked(m: &Migration) -> String {
    let asked = [
        (m.abort_requested, "to abort"),
        (
            m.force_complete_requested && !m.abort_requested,
            "to force completion",
        ),
        (m.ending == Some(Ending::Confirm), "to confirm"),
        (m.ending == Some(Ending::Revert), "to revert"),
    ];
    let asked = asked.iter().filter_map(|(is, what)| is.then_some(*what));
    match asked.collect::<Vec<_>>() {
        none if none.is_empty() => NOTHING_HERE.to_owned(),
        asked => asked.join(", "),
    }
}

/// Who asked, as far as that is known.
pub(super) fn who(r: &Requester) -> String {
    let known = [
        ("user", &r.user_id),
        ("project", &r.project_id),
        ("request", &r.request_id),
    ];
    let known = known
        .iter()
        .filter_map(|(name, id)| Some(format!("{name} {}", id.as_ref()?)));
    let known: Vec<_> = known.collect();
    if known.is_empty() {
        NOTHING_HERE.to_owned()
    } else {
        known.join(", ")
    }
}

fn options(way: &Way) -> String {
    let words = match way {
        Way::Live(options) => live_options(options),
        Way::Cold(options) => cold_options(options),
        Way::Transfer(transfer) => transfer_options(transfer),
        Way::Evacuation(evacuation) => vec![proof(&evacuation.proof)],
    };
    if words.is_empty() {
        NOTHING_HERE.to_owned()
    } else {
        words.join(", ")
    }
}

/// By what right a guest of a dead node is started elsewhere.
fn proof(proof: &ProofOfDeath) -> String {
    match proof {
        ProofOfDeath::Fence { agent, at_ms, .. } => {
            format!("its node is off: says {agent} at {}", moment(*at_ms))
        }
        ProofOfDeath::Operator { user, at_ms, .. } => {
            let user = user.as_deref().unwrap_or("an operator");
            format!("its node is off: says {user} at {}", moment(*at_ms))
        }
    }
}

fn live_options(o: &LiveOptions) -> Vec<String> {
    use drover_model::migration::BlockMigration as B;
    let copy = match o.block_migration {
        B::Auto => "copy disks that are not shared",
        B::Yes => "copy disks",
        B::No => "copy no disks",
    };
    let mut words = vec![copy.to_owned()];
    words.extend(o.post_copy.then(|| "post-copy allowed".to_owned()));
    words.extend(o.auto_converge.then(|| "auto-converge".to_owned()));
    words.extend(o.parallel_connections.map(|n| format!("{n} streams")));
    words.extend(o.bandwidth_mib_s.map(at_most));
    words.extend(
        o.max_downtime_ms
            .map(|ms| format!("downtime at most {}", span(ms))),
    );
    words.extend(o.progress_timeout_s.map(given_up_after));
    words
}

fn cold_options(o: &ColdOptions) -> Vec<String> {
    let mut words = Vec::new();
    words.extend(o.pre_copy.then(|| "copy disks before it stops".to_owned()));
    words.extend(
        o.shutdown_timeout_s
            .map(|s| format!("{s} s to shut down in")),
    );
    words.extend(
        o.force_stop_after_s
            .map(|s| format!("stopped hard after {s} s")),
    );
    words.extend(o.bandwidth_mib_s.map(at_most));
    words.extend(o.progress_timeout_s.map(given_up_after));
    words.extend(
        o.flavor
            .map(|f| format!("resized to {} vCPUs and {}", f.vcpus, mib(f.memory_mb))),
    );
    words
}

fn transfer_options(transfer: &ProjectTransfer) -> Vec<String> {
    let o = &transfer.options;
    let mode = match o.mode {
        TransferMode::Live => "live",
        TransferMode::Cold => "cold",
    };
    let mut words = vec![mode.to_owned()];
    let networks = o.networks.iter();
    words.extend(networks.map(|(old, new)| format!("network {old} -> {new}")));
    words.extend(o.keep_disk.then(|| "disks stay where they are".to_owned()));
    words.extend(o.new_mac.then(|| "new MAC addresses".to_owned()));
    words.extend(o.name.as_ref().map(|name| format!("renamed to {name}")));
    words.extend(o.title.as_ref().map(|title| format!("titled {title}")));
    words.extend(cold_options(&o.as_cold()));
    words
}

fn at_most(mib_s: u64) -> String {
    format!("at most {mib_s} MiB/s")
}

fn given_up_after(seconds: u64) -> String {
    format!("given up after {seconds} s without progress")
}

/// What a dry run of a migration found.
pub fn plan(plan: &Plan) -> String {
    let mut pairs = vec![
        planned_instance(plan),
        ("from", plan.source_host.to_string()),
        ("to", or_nothing(plan.dest_host.as_ref())),
    ];
    // A guest that is off leaves its memory behind.
    pairs.extend((plan.memory_mib > 0).then(|| ("memory", mib(plan.memory_mib))));
    planned(plan, pairs, "disks to copy", "would be accepted".to_owned())
}

/// What a dry run of a transfer to a project found, as the caller names it.
pub fn transfer_plan(plan: &Plan, project: &str) -> String {
    let host = &plan.source_host;
    let pairs = vec![
        planned_instance(plan),
        ("receiver", project.to_owned()),
        ("host", host.to_string()),
    ];
    let accepted = format!("would be transferred to {project} on {host}");
    planned(plan, pairs, "disks to move", accepted)
}

fn planned_instance(plan: &Plan) -> (&'static str, String) {
    let instance = format!("{} ({})", plan.instance_name, plan.instance_uuid);
    ("instance", instance)
}

fn planned(
    plan: &Plan,
    mut pairs: Vec<(&str, String)>,
    disks: &'static str,
    accepted: String,
) -> String {
    let carried: u64 = plan.copied_disks.iter().map(|d| d.allocated_bytes).sum();
    let number = plan.copied_disks.len();
    pairs.push((disks, format!("{number} ({})", bytes(carried))));
    let verdict = match plan.failures.len() {
        0 => accepted,
        n => format!("would be refused: {}", failed(n)),
    };
    pairs.push(("verdict", verdict));
    let each = plan.copied_disks.iter();
    let each = each.map(|d| format!("{}  {}", clean(&d.target), bytes(d.allocated_bytes)));
    facts(pairs)
        + &section(disks, each)
        + &section("decisions", plan.decisions.iter().map(|text| clean(text)))
        + &section("failed checks", failures(&plan.failures))
}

#[cfg(test)]
#[path = "describe_tests.rs"]
mod tests;
