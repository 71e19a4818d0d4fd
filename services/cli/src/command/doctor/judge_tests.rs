//! What the doctor makes of what it is told.

use super::*;
use crate::{exit::Exit, samples};

fn answer<T>(said: T, offset_ms: i64) -> Answer<T> {
    Answer {
        said,
        took_ms: 3,
        offset_ms,
    }
}

fn agent(host: &str) -> AgentStatus {
    AgentStatus {
        host: samples::host(host),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        clock_ms: samples::T0,
        libvirt: Ok(samples::inventory()),
        incarnation: 1,
        refused: None,
        speaks: drover_model::version::Spoken::Unsaid,
        migrations: Vec::new(),
        state: None,
        counters: std::collections::BTreeMap::new(),
    }
}

fn levels(findings: &[Finding]) -> Vec<(&'static str, Level)> {
    findings.iter().map(|f| (f.check, f.level)).collect()
}

fn level(findings: &[Finding], check: &str) -> Level {
    let found = findings.iter().find(|f| f.check == check);
    let found = found.unwrap_or_else(|| panic!("no {check} in {findings:?}"));
    let told = found.level == Level::Ok || found.remedy.is_some();
    assert!(told, "a fault without a remedy: {found:?}");
    found.level
}

#[test]
fn a_node_that_is_well_has_no_fault() {
    let conductor = answer(samples::conductor(), 0);
    let findings = node(
        &samples::node("kvm1"),
        &Ok(answer(agent("kvm1"), 5)),
        &conductor,
    );
    assert!(
        findings.iter().all(|f| f.level == Level::Ok),
        "{findings:?}"
    );
    let checks: Vec<_> = findings.iter().map(|f| f.check).collect();
    assert_eq!(
        checks,
        ["report", "placing", "agent", "libvirt", "version", "clock"]
    );
}

#[test]
fn each_fault_of_a_node_is_found_and_has_a_remedy() {
    let conductor = answer(samples::conductor(), 0);
    let mut sick = samples::node("kvm1");
    sick.up = false;
    sick.enabled = false;
    let mut said = agent("kvm1");
    said.libvirt = Err("no socket".to_owned());
    said.version = "0.0.9".to_owned();
    let findings = node(&sick, &Ok(answer(said, -5_000)), &conductor);
    assert_eq!(level(&findings, "report"), Level::Fail);
    assert_eq!(level(&findings, "placing"), Level::Warn);
    assert_eq!(level(&findings, "agent"), Level::Ok);
    assert_eq!(level(&findings, "libvirt"), Level::Fail);
    assert_eq!(level(&findings, "version"), Level::Warn);
    assert_eq!(level(&findings, "clock"), Level::Warn);
    assert!(
        findings
            .iter()
            .any(|f| f.message == "5.0 s behind the conductor's")
    );
}

#[test]
fn an_agent_that_is_silent_is_judged_by_its_last_report() {
    let conductor = answer(samples::conductor(), 0);
    let mut sick = samples::node("kvm1");
    sick.clock_offset_ms = 90_000;
    sick.report.hypervisor = HypervisorReport::Down {
        reason: "gone".to_owned(),
    };
    let silent = Trouble::new(Exit::TimedOut, "no answer").remedy("`drover doctor` tells");
    let findings = node(&sick, &Err(silent), &conductor);
    assert_eq!(level(&findings, "agent"), Level::Fail);
    assert_eq!(level(&findings, "libvirt"), Level::Fail);
    assert_eq!(level(&findings, "clock"), Level::Fail);
    let remedies: Vec<_> = findings
        .iter()
        .filter_map(|f| f.remedy.as_deref())
        .collect();
    assert!(
        remedies.iter().all(|text| !text.contains("drover doctor")),
        "{remedies:?}"
    );
}

#[test]
fn clocks_of_agents_are_compared_with_the_conductors_not_with_ours() {
    let conductor = answer(samples::conductor(), 60_000);
    let findings = node(
        &samples::node("kvm1"),
        &Ok(answer(agent("kvm1"), 60_010)),
        &conductor,
    );
    assert_eq!(level(&findings, "clock"), Level::Ok);
    assert_eq!(level(&super::conductor(&conductor), "clock"), Level::Fail);
}

#[test]
fn a_conductor_of_another_major_version_is_wrong() {
    let mut said = samples::conductor();
    said.version = "9.0.0".to_owned();
    assert_eq!(level(&conductor(&answer(said, 0)), "version"), Level::Fail);
}

#[test]
fn older_hypervisors_are_named() {
    let (old, mut new) = (samples::node("kvm1"), samples::node("kvm2"));
    let alike = together(&[old.clone(), samples::node("kvm2")]);
    assert_eq!(
        levels(&alike),
        [("count", Level::Ok), ("hypervisors", Level::Ok)]
    );
    if let HypervisorReport::Up { inventory, .. } = &mut new.report.hypervisor {
        inventory.hypervisor_version = 8_002_001;
    }
    let mixed = together(&[old, new]);
    assert_eq!(level(&mixed, "hypervisors"), Level::Warn);
    let message = &mixed[1].message;
    assert!(
        message.starts_with("kvm1 (libvirt 9.0.0, QEMU 7.2.0) older"),
        "{message}"
    );
}

#[test]
fn no_node_is_wrong_and_one_is_odd() {
    assert_eq!(level(&together(&[]), "count"), Level::Fail);
    assert_eq!(
        level(&together(&[samples::node("kvm1")]), "count"),
        Level::Warn
    );
}

#[test]
fn stuck_migrations_are_wrong() {
    let running = samples::running(samples::migration());
    let mut stuck = running.clone();
    stuck.status = MigrationStatus::Stuck;
    assert_eq!(
        level(&migrations(std::slice::from_ref(&running)), "stuck"),
        Level::Ok
    );
    let rests = samples::finished();
    let findings = migrations(&[running.clone(), rests]);
    assert_eq!(
        findings[0].message,
        "1 under way, none stuck, 1 to be confirmed or reverted"
    );
    let findings = migrations(&[running, stuck]);
    assert_eq!(findings.len(), 1);
    assert_eq!(level(&findings, "stuck"), Level::Fail);
    assert!(!Diagnosis::from(findings).healthy);
}

#[test]
fn a_node_that_was_declared_down_is_not_called_silent() {
    let conductor = answer(samples::conductor(), 0);
    let mut declared = samples::node("kvm1");
    (declared.forced_down, declared.up) = (true, false);
    let findings = node(&declared, &Ok(answer(agent("kvm1"), 0)), &conductor);
    assert_eq!(level(&findings, "report"), Level::Warn);
    assert_eq!(
        findings[0].message,
        "declared down by an operator; heard of 1.2 s ago"
    );
}

#[test]
fn a_lost_agent_fails_with_what_is_seen_of_its_node() {
    let conductor = answer(samples::conductor(), 0);
    let mut lost = samples::node("kvm1");
    lost.up = false;
    lost.agent_lost = Some(samples::agent_lost());
    let silent = Err(Trouble::new(Exit::TimedOut, "no answer"));
    let findings = node(&lost, &silent, &conductor);
    assert_eq!(level(&findings, "report"), Level::Fail);
    assert_eq!(
        findings[0].message,
        "its agent is lost: not heard of for 1.2 s; host_alive (source): kvm1 is not dead: kvm3 \
         reaches its libvirtd"
    );
}

#[test]
fn an_operation_that_halts_is_odd() {
    let active = [samples::drain()];
    let at = active[0].updated_at_ms;
    let findings = operations(&active, at + HALTED_MS - 1);
    assert_eq!(findings[0].message, "1 under way, none halted");
    let findings = operations(&active, at + HALTED_MS);
    assert_eq!(level(&findings, "halted"), Level::Warn);
    assert_eq!(
        findings[0].message,
        "operation 4 (the drain of kvm1) is running and nothing of it has changed for 15 min 0 s"
    );
}

#[test]
fn what_is_paused_is_not_forgotten() {
    let now = |evacuate: &str, balance: &str| Automation {
        evacuate: evacuate.to_owned(),
        balance: balance.to_owned(),
    };
    let findings = automation(&now("paused", "off"));
    assert_eq!(level(&findings, "evacuate"), Level::Warn);
    assert_eq!(level(&findings, "balance"), Level::Ok);
    assert!(
        findings[0]
            .remedy
            .as_deref()
            .unwrap()
            .contains("--evacuate on")
    );
}
