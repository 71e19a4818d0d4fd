//! One value told whole: a node, an instance, a migration's record, a plan.

use drover_model::{
    api::conductor::{Instance, Node, Plan},
    migration::{EndReason, LiveOptions, Migration, Transfer},
    node::HypervisorReport,
};

use super::{
    clean,
    outcome::{failed, failures},
    table::{NOTHING_HERE, grid, placing, power},
    units::{bytes, mib, moment, rate, share, span, version},
};

/// Names and values, one pair a line.
fn facts(pairs: Vec<(&str, String)>) -> String {
    let width = pairs.iter().map(|(name, _)| name.len()).max().unwrap_or(0);
    let line = |(name, value): &(&str, String)| format!("{name:<width$}  {}", clean(value));
    pairs.iter().map(line).collect::<Vec<_>>().join("\n")
}

/// A heading with indented lines under it; nothing if there are none.
fn section(heading: &str, lines: impl IntoIterator<Item = String>) -> String {
    let body: String = lines
        .into_iter()
        .map(|line| format!("\n  {line}"))
        .collect();
    if body.is_empty() {
        body
    } else {
        format!("\n\n{heading}{body}")
    }
}

fn or_nothing<T: ToString>(value: Option<T>) -> String {
    value.map_or_else(|| NOTHING_HERE.to_owned(), |value| value.to_string())
}

/// A node.
pub fn node(node: &Node) -> String {
    let placing = match &node.disabled_reason {
        Some(reason) if !node.enabled => format!("disabled: {reason}"),
        _ => placing(node).to_owned(),
    };
    let report = &node.report;
    let mut pairs = vec![
        ("host", node.host.to_string()),
        ("state", if node.up { "up" } else { "down" }.to_owned()),
        ("placing", placing),
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
                "{}, since {}",
                report.agent_version,
                moment(report.agent_started_ms)
            ),
        ),
    ];
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
                let state = if i.incoming {
                    "incoming"
                } else {
                    power(i.power_state)
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
    facts(pairs) + &section("instances", guests)
}

/// An instance.
pub fn instance(i: &Instance) -> String {
    facts(vec![
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
    ])
}

/// A migration's whole record.
pub fn migration(m: &Migration) -> String {
    let chosen = if m.dest_requested {
        "named by the caller"
    } else {
        "chosen by the conductor"
    };
    let to = m
        .dest_host
        .as_ref()
        .map(|host| format!("{host} ({chosen})"));
    let mut pairs = vec![
        ("id", m.id.to_string()),
        ("uuid", m.uuid.to_string()),
        ("type", m.migration_type.to_string()),
        (
            "instance",
            format!("{} ({})", m.instance_name, m.instance_uuid),
        ),
        ("project", m.project_id.clone()),
        ("from", m.source_host.to_string()),
        ("to", or_nothing(to)),
        ("status", m.status.to_string()),
        ("phase", m.progress.phase.as_str().to_owned()),
        ("step", step(m)),
        ("ended because", or_nothing(m.end_reason.as_ref())),
        (
            "downtime",
            m.downtime_ms
                .map_or_else(|| "not measured".to_owned(), span),
        ),
        ("total time", span(m.total_time_ms())),
        ("memory", transfer(&m.progress.memory)),
        ("disk", transfer(&m.progress.disk)),
        ("options", options(&m.options)),
        ("asked", asked(m)),
        ("requester", requester(m)),
        ("conductor", format!("{}, attempt {}", m.owner, m.attempt)),
        ("accepted", moment(m.created_at_ms)),
        ("changed", moment(m.updated_at_ms)),
        ("ended", or_nothing(m.finished_at_ms.map(moment))),
    ];
    if !m.status.is_final() {
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
    facts(pairs)
        + &section("failed checks", checks)
        + &section("steps", steps.lines().map(str::to_owned))
        + &section("decisions", decisions)
        + &section("warnings", m.warnings.iter().map(|text| clean(text)))
}

/// What only a running migration has.
fn now(m: &Migration) -> Vec<(&'static str, String)> {
    let p = &m.progress;
    vec![
        ("rate", rate(p.rate_bytes_s)),
        ("dirty rate", rate(p.dirty_rate_bytes_s)),
        ("iteration", p.iteration.to_string()),
        ("eta", or_nothing(p.eta_ms.map(span))),
        (
            "expected downtime",
            or_nothing(p.expected_downtime_ms.map(span)),
        ),
        (
            "allowed downtime",
            or_nothing(p.allowed_downtime_ms.map(span)),
        ),
        ("note", or_nothing(p.note.as_ref())),
        ("given up at", or_nothing(m.deadline_at_ms.map(moment))),
    ]
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
    if m.status.is_final() {
        return m.step.clone();
    }
    let since = m.updated_at_ms.saturating_sub(m.step_started_at_ms);
    format!("{}, for {}", m.step, span(since))
}

fn asked(m: &Migration) -> String {
    match (m.abort_requested, m.force_complete_requested) {
        (true, _) => "to abort".to_owned(),
        (false, true) => "to force completion".to_owned(),
        (false, false) => NOTHING_HERE.to_owned(),
    }
}

fn requester(m: &Migration) -> String {
    let r = &m.requester;
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

fn options(o: &LiveOptions) -> String {
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
    words.extend(o.bandwidth_mib_s.map(|n| format!("at most {n} MiB/s")));
    words.extend(
        o.max_downtime_ms
            .map(|ms| format!("downtime at most {}", span(ms))),
    );
    words.extend(
        o.progress_timeout_s
            .map(|s| format!("given up after {s} s without progress")),
    );
    words.join(", ")
}

/// What a dry run found.
pub fn plan(plan: &Plan) -> String {
    let to = or_nothing(plan.dest_host.as_ref());
    let copied: u64 = plan.copied_disks.iter().map(|d| d.allocated_bytes).sum();
    let mut pairs = vec![
        (
            "instance",
            format!("{} ({})", plan.instance_name, plan.instance_uuid),
        ),
        ("from", plan.source_host.to_string()),
        ("to", to),
        ("memory", mib(plan.memory_mib)),
        (
            "disks to copy",
            format!("{} ({})", plan.copied_disks.len(), bytes(copied)),
        ),
    ];
    let disks = plan.copied_disks.iter();
    let disks = disks.map(|d| format!("{}  {}", clean(&d.target), bytes(d.allocated_bytes)));
    let verdict = match plan.failures.len() {
        0 => "would be accepted".to_owned(),
        n => format!("would be refused: {}", failed(n)),
    };
    pairs.push(("verdict", verdict));
    facts(pairs)
        + &section("disks to copy", disks)
        + &section("decisions", plan.decisions.iter().map(|text| clean(text)))
        + &section("failed checks", failures(&plan.failures))
}

#[cfg(test)]
#[path = "describe_tests.rs"]
mod tests;
