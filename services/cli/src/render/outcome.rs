//! How things ended: a refusal with every failed check, trouble, a migration's
//! last line.

use drover_model::{
    check::CheckFailure,
    migration::{EndReason, Migration, MigrationStatus, Phase, Way},
};

use super::{
    clean,
    describe::{choices, destination, is_off_meanwhile},
    units::span,
};
use crate::exit::Trouble;

/// So many checks failed.
pub(super) fn failed(n: usize) -> String {
    if n == 1 {
        "1 check failed".to_owned()
    } else {
        format!("{n} checks failed")
    }
}

/// Every failed check, with what to do about it.
pub(crate) fn failures(checks: &[CheckFailure]) -> Vec<String> {
    let line = |c: &CheckFailure| {
        let first = format!("{} ({}): {}", c.code, c.side, clean(&c.message));
        let remedy = clean(&c.remedy);
        if remedy.is_empty() {
            vec![first]
        } else {
            vec![first, format!("    what to do: {remedy}")]
        }
    };
    checks.iter().flat_map(line).collect()
}

/// Trouble, for standard error.
pub fn trouble(trouble: &Trouble) -> String {
    let mut text = format!("drover: {}", clean(&trouble.message));
    if !trouble.checks.is_empty() {
        text = format!("{text}: {}", failed(trouble.checks.len()));
        for line in failures(&trouble.checks) {
            text.push_str(&format!("\n  {line}"));
        }
    }
    if let Some(remedy) = &trouble.remedy {
        text.push_str(&format!("\n  what to do: {}", clean(remedy)));
    }
    text
}

/// How a migration ended: warnings, then the line that tells the end, with
/// what an operator has to do under it.
pub fn end(m: &Migration) -> String {
    let warnings = m.warnings.iter();
    let warnings = warnings.map(|text| format!("warning: {}\n", clean(text)));
    let mut text = warnings.collect::<String>() + &end_line(m);
    if m.status == MigrationStatus::Finished {
        text.push_str(&format!(
            "\n  {} keeps its copy until one of these:",
            m.source_host
        ));
        for line in choices(m) {
            text.push_str(&format!("\n    {line}"));
        }
    }
    if let Some(EndReason::Refused { checks }) = &m.end_reason {
        for line in failures(checks) {
            text.push_str(&format!("\n  {line}"));
        }
    }
    text
}

fn end_line(m: &Migration) -> String {
    let name = clean(&m.instance_name);
    let total = span(m.total_time_ms());
    match m.status {
        MigrationStatus::Completed | MigrationStatus::Finished => format!(
            "{}: {name} is {}; {}, total {total}",
            m.status,
            there(m),
            downtime(m)
        ),
        MigrationStatus::Confirmed => format!(
            "confirmed: {name} is on {}; {} has {} its copy",
            destination(m),
            m.source_host,
            // What it left, the warnings say.
            if m.warnings.is_empty() {
                "removed"
            } else {
                "let go of"
            }
        ),
        MigrationStatus::Reverted => {
            format!("reverted: {name} is on {} again", m.source_host)
        }
        MigrationStatus::Stuck => format!(
            "stuck in step {}: {}\n  what to do: mend that, then `drover migration resume {}`",
            clean(&m.step),
            why(m),
            m.id
        ),
        status if is_between(m) => format!(
            "{status} after {name} began to change sides: {}; total {total}\n  \
             what to do: `drover instance show {}` tells where it is now",
            why(m),
            m.instance_uuid
        ),
        status => format!(
            "{status}: {name} stays {}; {}{}, total {total}",
            here(m),
            why(m),
            disturbance(m)
        ),
    }
}

/// Where it led.
fn there(m: &Migration) -> String {
    match &m.way {
        Way::Live(_) | Way::Cold(_) | Way::Evacuation(_) => format!("on {}", destination(m)),
        Way::Transfer(transfer) => format!("in project {}", clean(transfer.project.as_str())),
    }
}

/// Where it began.
fn here(m: &Migration) -> String {
    match m.way {
        Way::Live(_) | Way::Cold(_) | Way::Evacuation(_) => format!("on {}", m.source_host),
        Way::Transfer(_) => format!("in project {}", clean(&m.project_id)),
    }
}

/// Whether it ended while the guest changed sides. A transfer that fails is
/// undone, however far it was.
fn is_between(m: &Migration) -> bool {
    let is_migration = !matches!(m.way, Way::Transfer(_));
    is_migration && (Phase::PostCopy..Phase::Done).contains(&m.progress.phase)
}

/// How long the guest stood still, was off, or had no network.
fn downtime(m: &Migration) -> String {
    match (m.downtime_ms, is_off_meanwhile(&m.way), &m.way) {
        (Some(ms), true, _) => format!("it was off for {}", span(ms)),
        (None, true, _) => "off as before".to_owned(),
        (Some(ms), false, Way::Transfer(_)) => format!("network cut {}", span(ms)),
        (None, false, Way::Transfer(_)) => "no network cut measured".to_owned(),
        (Some(ms), false, _) => format!("downtime {}", span(ms)),
        (None, false, _) => "downtime not measured".to_owned(),
    }
}

/// That a guest which did not move was stopped, or lost its network, all the same.
fn disturbance(m: &Migration) -> String {
    match m.way {
        Way::Cold(_) | Way::Transfer(_) if m.downtime_ms.is_some() => {
            format!(", {}", downtime(m))
        }
        _ => String::new(),
    }
}

/// That a finished migration was not confirmed or reverted, as it was to be.
pub fn unsettled(m: &Migration) -> String {
    let reason = m.warnings.last().map(|text| clean(text));
    let reason = reason.unwrap_or_else(|| format!("migration {} stays finished", m.id));
    format!("drover: that did not succeed: {reason}")
}

fn why(m: &Migration) -> String {
    match (&m.end_reason, &m.progress.note) {
        (Some(EndReason::Refused { checks }), _) => failed(checks.len()),
        (Some(reason), _) => clean(&reason.to_string()),
        (None, Some(note)) => clean(note),
        (None, None) => format!("`drover migration show {}` tells more", m.id),
    }
}

#[cfg(test)]
mod tests {
    use drover_model::migration::TransferMode;

    use super::*;
    use crate::{exit::Exit, samples};

    #[test]
    fn a_refusal_lists_every_check_with_its_remedy() {
        let trouble_text = trouble(&Trouble::refused("demo-1 cannot move", samples::checks()));
        let expected = "\
drover: demo-1 cannot move: 2 checks failed
  memory (destination): kvm2 has 64 MiB left, 128 MiB needed
      what to do: free memory on kvm2
  network (destination): bridge br1[2J is missing";
        assert_eq!(trouble_text, expected);
    }

    #[test]
    fn trouble_is_one_line_and_a_remedy() {
        let told = trouble(&Trouble::new(Exit::Failed, "no\nbroker").remedy("start it"));
        assert_eq!(told, "drover: no broker\n  what to do: start it");
    }

    #[test]
    fn the_last_line_tells_downtime_and_total_time() {
        let mut m = samples::completed(samples::migration());
        assert_eq!(
            end(&m),
            "completed: demo-1 is on kvm2; downtime 212 ms, total 2.1 s"
        );
        m.downtime_ms = None;
        m.warnings = vec!["a\x07b".to_owned()];
        assert_eq!(
            end(&m),
            "warning: ab\ncompleted: demo-1 is on kvm2; downtime not measured, total 2.1 s"
        );
    }

    #[test]
    fn a_finished_one_tells_what_is_left_to_decide() {
        let mut m = samples::finished();
        let expected = "\
finished: demo-1 is on kvm2; it was off for 14.3 s, total 21.5 s
  kvm1 keeps its copy until one of these:
    `drover instance confirm demo-1`: kvm1 removes its copy
    `drover instance revert demo-1`: back to kvm1, as it was there
    `drover instance revert demo-1 --keep-changes`: back with all it wrote since";
        assert_eq!(end(&m), expected);
        m.downtime_ms = None;
        m.instance_name = "a b; reboot".to_owned();
        let text = end(&m);
        assert!(text.contains("; off as before, total 21.5 s"), "{text}");
        assert!(text.contains("confirm 11111111-2222-"), "{text}");
        m.status = MigrationStatus::Confirmed;
        assert!(end(&m).ends_with("is on kvm2; kvm1 has removed its copy"));
        m.status = MigrationStatus::Reverted;
        assert!(end(&m).ends_with("is on kvm1 again"));
    }

    #[test]
    fn a_cold_one_that_failed_tells_that_the_guest_was_stopped() {
        let mut m = samples::copying();
        m.status = MigrationStatus::Cancelled;
        m.end_reason = Some(EndReason::Aborted);
        m.downtime_ms = Some(5000);
        assert_eq!(
            end(&m),
            "cancelled: demo-1 stays on kvm1; aborted on request, it was off for 5.0 s, total 9.0 s"
        );
    }

    #[test]
    fn a_transfer_tells_whose_the_guest_is() {
        let mut m = samples::handed_over(samples::handover(TransferMode::Live));
        assert_eq!(
            end(&m),
            "completed: demo-1 is in project blue; network cut 34 ms, total 2.1 s"
        );
        m.downtime_ms = None;
        assert!(end(&m).contains("; no network cut measured, total"));
        let mut m = samples::handed_over(samples::handover(TransferMode::Cold));
        assert!(
            end(&m).contains("; it was off for 34 ms, total"),
            "{}",
            end(&m)
        );
        m.status = MigrationStatus::Failed;
        m.progress.phase = Phase::Finishing;
        m.end_reason = Some(EndReason::Failed {
            message: "the disk is full".to_owned(),
        });
        assert_eq!(
            end(&m),
            "failed: demo-1 stays in project default; the disk is full, it was off for 34 ms, \
             total 2.1 s"
        );
    }

    #[test]
    fn every_other_end_tells_where_the_guest_is_and_why() {
        let mut m = samples::running(samples::migration());
        m.status = MigrationStatus::Failed;
        m.end_reason = Some(EndReason::Failed {
            message: "QEMU on kvm2 died".to_owned(),
        });
        assert_eq!(
            end(&m),
            "failed: demo-1 stays on kvm1; QEMU on kvm2 died, total 1.0 s"
        );

        m.progress.phase = Phase::PostCopy;
        let text = end(&m);
        assert!(
            text.starts_with("failed after demo-1 began to change sides: QEMU"),
            "{text}"
        );
        assert!(text.contains("drover instance show 11111111"), "{text}");

        m.progress.phase = Phase::Checking;
        m.end_reason = Some(EndReason::Refused {
            checks: samples::checks(),
        });
        let text = end(&m);
        assert!(
            text.starts_with("failed: demo-1 stays on kvm1; 2 checks failed, total"),
            "{text}"
        );
        assert!(text.contains("\n  memory (destination)"), "{text}");

        m.status = MigrationStatus::Cancelled;
        m.end_reason = Some(EndReason::Aborted);
        assert!(end(&m).starts_with("cancelled: demo-1 stays on kvm1; aborted on request"));

        m.status = MigrationStatus::Stuck;
        m.end_reason = None;
        let text = end(&m);
        assert!(
            text.starts_with("stuck in step transfer: `drover migration show 7`"),
            "{text}"
        );
        assert!(text.ends_with("`drover migration resume 7`"), "{text}");
    }
}
