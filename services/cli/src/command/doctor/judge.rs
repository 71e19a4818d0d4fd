//! The doctor's judgement: from what was seen to what is well, what is odd and
//! what is wrong, with something to do about each fault. No I/O.

use drover_model::{
    api::{
        compute::AgentStatus,
        conductor::{Automation, ConductorStatus, Instance, LeftAlone, Node},
    },
    ids::HostName,
    migration::{Migration, MigrationStatus},
    node::HypervisorReport,
    operation::Operation,
};
use serde::Serialize;

use crate::{
    exit::Trouble,
    render::{
        operation::noun,
        units::{ODD_CLOCK_MS, span, version},
    },
};

/// Unreadable guests of one node that are told of one by one.
const SHOWN_GUESTS: usize = 20;
/// Clocks further apart than this make records and logs useless.
const WRONG_CLOCK_MS: u64 = 30_000;

/// An operation of which nothing changed for so long has come to a halt.
const HALTED_MS: u64 = 900_000;

/// How a check came out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Level {
    /// Well.
    Ok,
    /// Works, but somebody should know.
    Warn,
    /// Does not work.
    Fail,
}

/// One check.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// How it came out.
    pub level: Level,
    /// Of whom: `broker`, `conductor`, a host name, ….
    pub subject: String,
    /// What was looked at.
    pub check: &'static str,
    /// What was seen.
    pub message: String,
    /// What to do about it; none where nothing is to be done.
    pub remedy: Option<String>,
}

/// All checks. Its JSON is `{"healthy", "findings": [{"level", "subject",
/// "check", "message", "remedy"}]}`; levels are `ok`, `warn` and `fail`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Diagnosis {
    /// Nothing failed.
    pub healthy: bool,
    /// In the order in which one thing needs the other.
    pub findings: Vec<Finding>,
}

impl From<Vec<Finding>> for Diagnosis {
    fn from(findings: Vec<Finding>) -> Self {
        let healthy = findings.iter().all(|f| f.level != Level::Fail);
        Self { healthy, findings }
    }
}

impl Finding {
    fn new(level: Level, subject: &str, check: &'static str, message: impl Into<String>) -> Self {
        Self {
            level,
            subject: subject.to_owned(),
            check,
            message: message.into(),
            remedy: None,
        }
    }

    /// All is well.
    pub fn ok(subject: &str, check: &'static str, message: impl Into<String>) -> Self {
        Self::new(Level::Ok, subject, check, message)
    }

    fn warn(subject: &str, check: &'static str, message: impl Into<String>) -> Self {
        Self::new(Level::Warn, subject, check, message)
    }

    fn fail(subject: &str, check: &'static str, message: impl Into<String>) -> Self {
        Self::new(Level::Fail, subject, check, message)
    }

    /// Something could not be done.
    pub fn trouble(subject: &str, check: &'static str, trouble: &Trouble) -> Self {
        let remedy = trouble.remedy.clone();
        // The doctor does not send anybody to the doctor.
        let remedy = remedy.filter(|text| !text.contains("drover doctor"));
        Self {
            remedy,
            ..Self::fail(subject, check, trouble.message.clone())
        }
    }

    fn remedy(mut self, remedy: impl Into<String>) -> Self {
        self.remedy = Some(remedy.into());
        self
    }
}

/// Who answered, how fast, and how its clock stands to ours.
#[derive(Debug, Clone)]
pub struct Answer<T> {
    /// What it said.
    pub said: T,
    /// After how long, ms.
    pub took_ms: u64,
    /// Its clock less ours, ms.
    pub offset_ms: i64,
}

/// What an agent answered, or why it did not.
pub type AgentAnswer = Result<Answer<AgentStatus>, Trouble>;

/// The conductor that answered, against this command.
pub fn conductor(answer: &Answer<ConductorStatus>) -> Vec<Finding> {
    let Answer {
        said,
        took_ms,
        offset_ms,
    } = answer;
    let who = "conductor";
    let message = format!(
        "{} answers in {} ({}, {} migrations in hand)",
        said.conductor,
        span(*took_ms),
        said.database,
        said.migrations_owned
    );
    vec![
        Finding::ok(who, "answers", message),
        same_version(
            who,
            &said.version,
            "this command",
            env!("CARGO_PKG_VERSION"),
        ),
        clock(who, *offset_ms, "this machine's"),
    ]
    .into_iter()
    .chain(said.left_alone.iter().map(left_alone))
    .collect()
}

/// What a newer conductor wrote waits for one.
fn left_alone(left: &LeftAlone) -> Finding {
    let message = format!("{} is left alone: {}", left.what, left.why);
    Finding::warn("conductor", "newer", message)
        .remedy("upgrade this conductor, or start a newer one: it goes on with that")
}

/// A node, against the conductor.
pub fn node(node: &Node, agent: &AgentAnswer, conductor: &Answer<ConductorStatus>) -> Vec<Finding> {
    let host = node.host.as_str();
    let down_after_s = conductor.said.service_down_time_s;
    let mut findings = vec![heard(node, down_after_s), placing(node)];
    let (agent_version, offset_ms) = match agent {
        Ok(answer) => {
            let message = format!("answers in {}", span(answer.took_ms));
            findings.push(Finding::ok(host, "agent", message));
            let offset_ms = answer.offset_ms.saturating_sub(conductor.offset_ms);
            (&answer.said.version, offset_ms)
        }
        Err(trouble) => {
            findings.push(no_agent(host, trouble));
            (&node.report.agent_version, node.clock_offset_ms)
        }
    };
    findings.push(libvirt(node, agent));
    findings.push(same_version(
        host,
        agent_version,
        "the conductor",
        &conductor.said.version,
    ));
    findings.push(clock(host, offset_ms, "the conductor's"));
    findings.extend(mismatch(node));
    findings.extend(refusal(node, agent));
    findings.extend(unreadable(node));
    findings
}

/// Nothing is asked of an agent with which the conductor has no version in common.
fn mismatch(node: &Node) -> Option<Finding> {
    let why = node.version_mismatch.as_ref()?;
    let (found, remedy) = why
        .rsplit_once("; ")
        .unwrap_or((why, "upgrade the older one"));
    let message = format!("nothing can be asked of its agent: {found}");
    Some(Finding::fail(node.host.as_str(), "rpc", message).remedy(remedy))
}

/// What is refused in the node's name: a second agent, reports that are too old.
fn refusal(node: &Node, agent: &AgentAnswer) -> Option<Finding> {
    let said = agent.as_ref().ok().and_then(|a| a.said.refused.as_ref());
    let reason = node.refusal.as_ref().or(said)?;
    let finding = Finding::fail(node.host.as_str(), "refused", reason.clone());
    Some(
        finding.remedy(
            "see that one drover-compute alone has this [compute] host, and restart it there",
        ),
    )
}

/// Guests that cannot be read on the node.
fn unreadable(node: &Node) -> Vec<Finding> {
    let HypervisorReport::Up { instances, .. } = &node.report.hypervisor else {
        return Vec::new();
    };
    let broken = instances.iter().filter_map(|i| {
        let reason = i.unreadable.as_ref()?;
        let message = format!("{} ({}): {reason}", i.name, i.id);
        let finding = Finding::warn(node.host.as_str(), "unreadable", message);
        Some(finding.remedy("mend it on its node; meanwhile it alone cannot be moved"))
    });
    broken.take(SHOWN_GUESTS).collect()
}

/// Instances that nodes which were installed anew do not have any more.
pub fn lost(instances: &[Instance]) -> Vec<Finding> {
    let lost = instances.iter().filter_map(|i| {
        let why = i.lost.as_ref()?;
        let message = format!("{} ({}): {}", i.name, i.uuid, why.message);
        Some(Finding::fail("instances", "lost", message).remedy(&why.remedy))
    });
    lost.take(SHOWN_GUESTS).collect()
}

/// Instances of which two copies are, or may be, running.
pub fn copies(instances: &[Instance]) -> Vec<Finding> {
    let doubled = instances.iter().filter_map(|i| {
        let other = i.other_copy.as_ref()?;
        let (here, there) = (&i.host, &other.host);
        let remedy = format!(
            "look with 'virsh list --all' on {here} and {there}, and stop the one that is not to run"
        );
        let finding = match other.both_run {
            true => Finding::fail(
                "instances",
                "copies",
                format!("TWO COPIES of {} ({}) run: on {here} and on {there}", i.name, i.uuid),
            ),
            false => Finding::warn(
                "instances",
                "copies",
                format!(
                    "{} ({}) is on the record on {here}, and a copy is active on {there}",
                    i.name, i.uuid
                ),
            ),
        };
        Some(finding.remedy(remedy))
    });
    let found: Vec<Finding> = doubled.collect();
    if found.is_empty() {
        return vec![Finding::ok(
            "instances",
            "copies",
            "each runs in one place alone",
        )];
    }
    found
}

fn heard(node: &Node, down_after_s: u64) -> Finding {
    let host = node.host.as_str();
    let age = span(node.report_age_ms);
    if node.forced_down {
        let message = format!("declared down by an operator; heard of {age} ago");
        return Finding::warn(host, "report", message).remedy(format!(
            "when it is back and well: `drover node force-down {host} --unset`"
        ));
    }
    if let Some(lost) = node.agent_lost.as_ref().filter(|_| !node.up) {
        let reasons = drover_model::check::texts(&lost.reasons);
        let message = format!("its agent is lost: not heard of for {age}; {reasons}");
        return Finding::fail(host, "report", message).remedy(format!(
            "its guests may be well: see that drover-compute runs on {host}; `drover node show {host}` has the evidence"
        ));
    }
    if node.up {
        return Finding::ok(host, "report", format!("heard of {age} ago"));
    }
    Finding::fail(
        host,
        "report",
        format!("not heard of for {age}; it counts as down after {down_after_s} s"),
    )
    .remedy(format!(
        "see that {host} runs, that drover-compute runs on it, and in its log whether it reaches the broker"
    ))
}

fn placing(node: &Node) -> Finding {
    let host = node.host.as_str();
    if node.enabled {
        return Finding::ok(host, "placing", "enabled");
    }
    let reason = node.disabled_reason.as_deref().unwrap_or("no reason given");
    Finding::warn(
        host,
        "placing",
        format!("disabled, takes no instances: {reason}"),
    )
    .remedy(format!("when it is fit again: `drover node enable {host}`"))
}

fn no_agent(host: &str, trouble: &Trouble) -> Finding {
    let finding = Finding::trouble(host, "agent", trouble);
    match finding.remedy {
        Some(_) => finding,
        None => finding.remedy(format!("see the log of drover-compute on {host}")),
    }
}

/// What the agent says now counts before its last report.
fn libvirt(node: &Node, agent: &AgentAnswer) -> Finding {
    let host = node.host.as_str();
    let seen = match (agent, &node.report.hypervisor) {
        (Ok(answer), _) => answer.said.libvirt.as_ref().map_err(String::as_str),
        (Err(_), HypervisorReport::Up { inventory, .. }) => Ok(inventory),
        (Err(_), HypervisorReport::Down { reason }) => Err(reason.as_str()),
    };
    match seen {
        Ok(has) => {
            let (libvirt, qemu) = (
                version(has.libvirt_version),
                version(has.hypervisor_version),
            );
            let kvm = if has.kvm {
                "offers KVM"
            } else {
                "offers no KVM"
            };
            let message = format!("libvirt {libvirt}, {} {qemu}, {kvm}", has.hypervisor_type);
            Finding::ok(host, "libvirt", message)
        }
        Err(reason) => Finding::fail(host, "libvirt", format!("does not answer: {reason}")).remedy(
            format!("start libvirtd on {host}; the agent connects again by itself"),
        ),
    }
}

fn same_version(who: &str, theirs: &str, other: &str, others: &str) -> Finding {
    if theirs == others {
        return Finding::ok(who, "version", theirs);
    }
    let message = format!("{theirs}, but {other} has {others}");
    let remedy = "bring all of Drover to one version";
    if major(theirs) == major(others) {
        Finding::warn(who, "version", message).remedy(remedy)
    } else {
        Finding::fail(who, "version", message).remedy(remedy)
    }
}

fn major(version: &str) -> &str {
    version.split('.').next().unwrap_or(version)
}

fn clock(who: &str, offset_ms: i64, whose: &str) -> Finding {
    let off = offset_ms.unsigned_abs();
    let side = if offset_ms < 0 { "behind" } else { "ahead of" };
    let message = format!("{} {side} {whose}", span(off));
    let remedy = "keep all clocks by NTP (chrony or systemd-timesyncd)";
    match off {
        0..=ODD_CLOCK_MS => Finding::ok(who, "clock", message),
        off if off <= WRONG_CLOCK_MS => Finding::warn(who, "clock", message).remedy(remedy),
        _ => Finding::fail(who, "clock", message).remedy(remedy),
    }
}

/// The nodes against each other.
pub fn together(nodes: &[Node]) -> Vec<Finding> {
    let who = "nodes";
    let fit = nodes.iter().filter(|n| n.up && n.enabled).count();
    let count = format!("{} known, {fit} up and enabled", nodes.len());
    let mut findings = vec![match (nodes.len(), fit) {
        (0, _) => Finding::fail(who, "count", "no agent has ever reported").remedy(
            "start drover-compute on every node, with the conductor's broker and control_exchange",
        ),
        (_, 0 | 1) => Finding::warn(who, "count", format!("{count}: nothing can move"))
            .remedy("two nodes that are up and enabled are needed"),
        _ => Finding::ok(who, "count", count),
    }];
    findings.extend(older_hypervisors(nodes));
    findings
}

/// Guests move to a hypervisor that is as new or newer, never to an older one.
fn older_hypervisors(nodes: &[Node]) -> Option<Finding> {
    let versions: Vec<(&HostName, (u64, u64))> = nodes.iter().filter_map(hypervisor).collect();
    let newest_qemu = versions.iter().map(|(_, v)| v.1).max()?;
    let newest_libvirt = versions.iter().map(|(_, v)| v.0).max()?;
    let is_older = |v: &(u64, u64)| v.0 < newest_libvirt || v.1 < newest_qemu;
    let older: Vec<String> = versions
        .iter()
        .filter(|(_, v)| is_older(v))
        .map(|(host, v)| format!("{host} (libvirt {}, QEMU {})", version(v.0), version(v.1)))
        .collect();
    if versions.len() < 2 {
        return None;
    }
    let newest = format!(
        "libvirt {}, QEMU {}",
        version(newest_libvirt),
        version(newest_qemu)
    );
    Some(if older.is_empty() {
        Finding::ok("nodes", "hypervisors", format!("all alike: {newest}"))
    } else {
        let message = format!(
            "{} older than the newest ({newest}): guests of newer nodes cannot move there",
            older.join(", ")
        );
        Finding::warn("nodes", "hypervisors", message).remedy("upgrade libvirt and QEMU there")
    })
}

fn hypervisor(node: &Node) -> Option<(&HostName, (u64, u64))> {
    match &node.report.hypervisor {
        HypervisorReport::Up { inventory, .. } => Some((
            &node.host,
            (inventory.libvirt_version, inventory.hypervisor_version),
        )),
        HypervisorReport::Down { .. } => None,
    }
}

/// Migrations that wait for somebody.
pub fn migrations(active: &[Migration]) -> Vec<Finding> {
    let stuck = |m: &&Migration| m.status == MigrationStatus::Stuck;
    let findings: Vec<Finding> = active.iter().filter(stuck).map(stuck_one).collect();
    if findings.is_empty() {
        let under_way = active.iter().filter(|m| !m.status.rests()).count();
        let message = match active.len().saturating_sub(under_way) {
            0 => format!("{under_way} under way, none stuck"),
            n => format!("{under_way} under way, none stuck, {n} to be confirmed or reverted"),
        };
        return vec![Finding::ok("migrations", "stuck", message)];
    }
    findings
}

fn stuck_one(m: &Migration) -> Finding {
    let why = match (&m.end_reason, &m.progress.note) {
        (Some(reason), _) => format!(": {reason}"),
        (None, Some(note)) => format!(": {note}"),
        (None, None) => String::new(),
    };
    let message = format!(
        "migration {} of {} is stuck in step {}{why}",
        m.id, m.instance_name, m.step
    );
    Finding::fail("migrations", "stuck", message).remedy(format!(
        "`drover migration show {0}`, mend it, `drover migration resume {0}`",
        m.id
    ))
}

/// What this command does not understand.
pub fn newer<'a>(who: &'a str, lines: &'a [String]) -> impl Iterator<Item = Finding> + 'a {
    let finding = |line: &'a String| Finding::warn(who, "newer", line.clone());
    lines.iter().map(finding)
}

/// Operations that have come to a halt. By the conductor's clock.
pub fn operations(active: &[Operation], now_ms: u64) -> Vec<Finding> {
    let idle_ms = |o: &Operation| now_ms.saturating_sub(o.updated_at_ms);
    let halted = active.iter().filter(|o| idle_ms(o) >= HALTED_MS);
    let findings = halted.map(|o| {
        let message = format!(
            "operation {} ({}) is {} and nothing of it has changed for {}",
            o.id,
            noun(&o.task),
            o.status,
            span(idle_ms(o))
        );
        Finding::warn("operations", "halted", message).remedy(format!(
            "`drover operation show {0}` tells what each guest waits for; \
             `drover operation cancel {0}` calls it off",
            o.id
        ))
    });
    let findings: Vec<Finding> = findings.collect();
    if findings.is_empty() {
        let message = format!("{} under way, none halted", active.len());
        return vec![Finding::ok("operations", "halted", message)];
    }
    findings
}

/// What the conductor does by itself, and does not for now.
pub fn automation(now: &Automation) -> Vec<Finding> {
    let of = |check: &'static str, state: &str| match state {
        "paused" => Finding::warn("automation", check, "paused: switched off for now").remedy(
            format!("when the maintenance is over: `drover node automation --{check} on`"),
        ),
        state => Finding::ok("automation", check, state),
    };
    vec![of("evacuate", &now.evacuate), of("balance", &now.balance)]
}

#[cfg(test)]
#[path = "judge_tests.rs"]
mod tests;
