//! What is shown of a migration on its way. What a bar shows never runs
//! backwards, whatever samples come: memory that the guest writes anew, totals
//! that grow and samples that arrive late hold it where it is. The true rates,
//! and a note when it does not converge, stand beside it.

use drover_model::migration::{
    Migration, MigrationStatus, MigrationType, Phase, Progress, Transfer, Way,
};

use super::{
    clean,
    describe::destination,
    units::{rate, share, span},
};

const BAR_WIDTH: usize = 24;

/// Bytes of one kind, as shown: neither number ever shrinks.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Held {
    /// Arrived.
    pub moved: u64,
    /// In all.
    pub total: u64,
    /// How much of the bar is full, in thousandths.
    pub per_mille: u16,
}

impl Held {
    fn take(&mut self, sample: &Transfer) {
        self.total = self.total.max(sample.total_bytes);
        self.moved = self.moved.max(arrived(sample)).min(self.total);
        self.per_mille = self.per_mille.max(thousandths(self.moved, self.total));
    }
}

/// What has arrived. Before anything was sent some hypervisors report nothing
/// remaining, which is not the same as all of it being there.
fn arrived(sample: &Transfer) -> u64 {
    match sample.processed_bytes {
        0 => 0,
        _ => sample.total_bytes.saturating_sub(sample.remaining_bytes),
    }
}

fn thousandths(moved: u64, total: u64) -> u16 {
    if total == 0 {
        return 0;
    }
    let share = u128::from(moved) * 1000 / u128::from(total);
    u16::try_from(share.min(1000)).unwrap_or(1000)
}

/// What is shown of a migration's progress.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Shown {
    /// Of all of it; 100 only once the guest has moved.
    pub percent: u8,
    /// Disks.
    pub disk: Held,
    /// Memory.
    pub memory: Held,
}

impl Shown {
    /// What is shown of a record that is looked at once.
    pub fn of(migration: &Migration) -> Self {
        let mut shown = Self::default();
        shown.take(migration);
        shown
    }

    /// Takes the next record in.
    pub fn take(&mut self, migration: &Migration) {
        self.disk.take(&migration.progress.disk);
        self.memory.take(&migration.progress.memory);
        self.percent = self.percent.max(self.overall(migration));
    }

    /// Arrived, of disks and memory.
    pub fn moved(&self) -> u64 {
        self.disk.moved.saturating_add(self.memory.moved)
    }

    /// Disks and memory in all.
    pub fn total(&self) -> u64 {
        self.disk.total.saturating_add(self.memory.total)
    }

    fn overall(&self, m: &Migration) -> u8 {
        if has_come_through(m.status) {
            return 100;
        }
        let is_live = m.way.migration_type() == MigrationType::LiveMigration;
        let most = match m.progress.phase {
            // All is there: no bytes are counted any more.
            Phase::SwitchOver | Phase::Finishing if !is_live => return 99,
            // How much memory there is shows only once its turn has come; until
            // then the disks are half of the whole.
            _ if is_live && self.memory.total == 0 => 50,
            _ => 99,
        };
        let whole = thousandths(self.moved(), self.total()) / 10;
        u8::try_from(whole).unwrap_or(u8::MAX).min(most)
    }
}

/// Whether the move itself succeeded, even if it is taken back since.
fn has_come_through(status: MigrationStatus) -> bool {
    use MigrationStatus as S;
    status.has_moved() || matches!(status, S::Confirming | S::Reverting | S::Reverted)
}

/// The lines of a terminal's display.
pub fn bars(migration: &Migration, shown: &Shown) -> Vec<String> {
    let mut lines = vec![format!("{} {:>3} %", heading(migration), shown.percent)];
    // Rates are of what moves last.
    let rates = rates(migration).join("  ");
    let has_memory = shown.memory.total > 0;
    if shown.disk.total > 0 {
        let beside = if has_memory { "" } else { &rates };
        lines.push(bar("disk", &shown.disk, beside));
    }
    if has_memory {
        lines.push(bar("memory", &shown.memory, &rates));
    }
    let outlook = outlook(migration).join("  ");
    if !outlook.is_empty() {
        lines.push(format!("  {outlook}"));
    }
    lines
}

fn bar(name: &str, held: &Held, beside: &str) -> String {
    let full = BAR_WIDTH * usize::from(held.per_mille) / 1000;
    let (full, empty) = ("#".repeat(full), ".".repeat(BAR_WIDTH - full));
    let share = share(held.moved, held.total);
    let line = format!("  {name:<6} [{full}{empty}] {share}  {beside}");
    line.trim_end().to_owned()
}

/// One line, for where there is no terminal.
pub fn line(migration: &Migration, shown: &Shown) -> String {
    format!(
        "{:>7}  {}{}",
        span(migration.total_time_ms()),
        heading(migration),
        numbers(migration, shown)
    )
}

/// How far it is and how it goes on, each behind a comma.
pub fn numbers(migration: &Migration, shown: &Shown) -> String {
    let mut parts = Vec::new();
    if shown.total() > 0 {
        parts.push(format!("{} %", shown.percent));
    }
    for (name, held) in [("disk", &shown.disk), ("memory", &shown.memory)] {
        if held.total > 0 {
            parts.push(format!("{name} {}", share(held.moved, held.total)));
        }
    }
    parts.extend(rates(migration));
    parts.extend(outlook(migration));
    parts.iter().map(|part| format!(", {part}")).collect()
}

fn heading(m: &Migration) -> String {
    let word = m.progress.phase.as_str();
    let is_said = m.status.as_str().contains(word);
    let phase = if m.status.rests() || m.progress.phase == Phase::Done || is_said {
        String::new()
    } else {
        format!(" ({word})")
    };
    let name = clean(&m.instance_name);
    format!("{name}  {}  {}{phase}", path(m), m.status)
}

/// From where to where, or from whom to whom.
fn path(m: &Migration) -> String {
    let from = &m.source_host;
    match &m.way {
        Way::Live(_) | Way::Cold(_) | Way::Evacuation(_) => format!("{from} -> {}", destination(m)),
        Way::Transfer(transfer) => {
            let (giver, receiver) = (clean(&m.project_id), clean(transfer.project.as_str()));
            format!("{giver} -> {receiver} on {from}")
        }
    }
}

/// The last sample, while there is more to come.
fn current(m: &Migration) -> Option<&Progress> {
    (!m.status.rests()).then_some(&m.progress)
}

fn rates(m: &Migration) -> Vec<String> {
    let mut rates = Vec::new();
    let Some(progress) = current(m) else {
        return rates;
    };
    if progress.rate_bytes_s > 0 {
        rates.push(rate(progress.rate_bytes_s));
    }
    if progress.dirty_rate_bytes_s > 0 {
        rates.push(format!("dirty {}", rate(progress.dirty_rate_bytes_s)));
    }
    rates
}

fn outlook(m: &Migration) -> Vec<String> {
    let mut outlook = Vec::new();
    let Some(progress) = current(m) else {
        return outlook;
    };
    if let Some(eta) = progress.eta_ms {
        outlook.push(format!("ETA {}", span(eta)));
    }
    if let Some(expected) = progress.expected_downtime_ms {
        let allowed = progress.allowed_downtime_ms;
        let allowed = allowed.map(|ms| format!(" of {} allowed", span(ms)));
        let allowed = allowed.unwrap_or_default();
        outlook.push(format!("expected downtime {}{allowed}", span(expected)));
    }
    if let Some(note) = &progress.note {
        outlook.push(clean(note));
    }
    outlook
}

#[cfg(test)]
mod tests {
    use drover_model::migration::{Phase, TransferMode};
    use proptest::prelude::*;

    use super::*;
    use crate::samples;

    #[test]
    fn bars_look_so() {
        let m = samples::running(samples::migration());
        let expected = [
            "demo-1  kvm1 -> kvm2  running (memory)  61 %",
            "  disk   [###############.........] 0.6/1 GiB",
            "  memory [############............] 64/128 MiB  90 MiB/s  dirty 4 MiB/s",
            "  ETA 1.5 s  expected downtime 120 ms of 300 ms allowed",
        ];
        assert_eq!(bars(&m, &Shown::of(&m)), expected);
    }

    #[test]
    fn a_line_looks_so() {
        let mut m = samples::migration();
        assert_eq!(
            line(&m, &Shown::of(&m)),
            "   0 ms  demo-1  kvm1 -> kvm2  accepted (waiting)"
        );
        m = samples::running(m);
        m.progress.eta_ms = None;
        m.progress.note = Some("dirties 210 MiB/s,\x1b[5m link carries 180 MiB/s".to_owned());
        assert_eq!(
            line(&m, &Shown::of(&m)),
            "  1.0 s  demo-1  kvm1 -> kvm2  running (memory), 61 %, disk 0.6/1 GiB, \
             memory 64/128 MiB, 90 MiB/s, dirty 4 MiB/s, expected downtime 120 ms of 300 ms allowed, \
             dirties 210 MiB/s,[5m link carries 180 MiB/s"
        );
    }

    #[test]
    fn a_cold_one_looks_so() {
        let m = samples::stopping();
        let mut shown = Shown::of(&m);
        let expected = [
            "demo-1  kvm1 -> kvm2  migrating (stopping)   0 %",
            "  waiting for the guest to shut down: 7 s",
        ];
        assert_eq!(bars(&m, &shown), expected);
        let m = samples::copying();
        shown.take(&m);
        let expected = [
            "demo-1  kvm1 -> kvm2  migrating (disk)  63 %",
            "  disk   [###############.........] 0.6/1 GiB  90 MiB/s",
            "  ETA 4.1 s",
        ];
        assert_eq!(bars(&m, &shown), expected);
        let m = samples::finished();
        shown.take(&m);
        let expected = [
            "demo-1  kvm1 -> kvm2  finished 100 %",
            "  disk   [########################] 1/1 GiB",
        ];
        assert_eq!(bars(&m, &shown), expected);
    }

    #[test]
    fn a_transfer_looks_so() {
        let mut m = samples::moving(samples::handover(TransferMode::Live));
        let mut shown = Shown::of(&m);
        let expected = [
            "demo-1  default -> blue on kvm1  running (disk)  63 %",
            "  disk   [###############.........] 0.6/1 GiB  90 MiB/s",
        ];
        assert_eq!(bars(&m, &shown), expected);
        m.progress.phase = Phase::Finishing;
        m.progress.rate_bytes_s = 0;
        shown.take(&m);
        let text = line(&m, &shown);
        assert_eq!(
            text,
            "  1.0 s  demo-1  default -> blue on kvm1  running (finishing), 99 %, disk 0.6/1 GiB"
        );
        shown.take(&samples::handed_over(m));
        assert_eq!(shown.percent, 100);
    }

    #[test]
    fn a_guest_that_stops_after_its_disks_were_copied_does_not_set_the_bar_back() {
        let mut m = samples::copying();
        m.status = MigrationStatus::PreMigrating;
        m.progress.phase = Phase::PreCopy;
        let mut shown = Shown::of(&m);
        assert!(bars(&m, &shown)[0].ends_with("pre-migrating (pre-copy)  63 %"));
        shown.take(&samples::stopping());
        assert_eq!((shown.percent, shown.disk.per_mille), (63, 634));
        let mut m = samples::copying();
        m.progress.phase = Phase::SwitchOver;
        m.progress.disk = Transfer::default();
        assert_eq!(Shown::of(&m).percent, 99, "shared disks are not carried");
        for status in [MigrationStatus::Reverting, MigrationStatus::Confirming] {
            m.status = status;
            assert_eq!(Shown::of(&m).percent, 100);
        }
    }

    #[test]
    fn a_word_is_not_said_twice() {
        let mut m = samples::running(samples::migration());
        m.status = MigrationStatus::RunningPostCopy;
        m.progress.phase = Phase::PostCopy;
        assert!(heading(&m).ends_with("running (post-copy)"));
        let mut m = samples::finished();
        m.status = MigrationStatus::Confirming;
        assert!(heading(&m).ends_with("confirming"));
    }

    #[test]
    fn nothing_remaining_before_anything_was_sent_is_nothing_moved() {
        let mut m = samples::migration();
        m.progress.memory.total_bytes = 128;
        assert_eq!(Shown::of(&m).percent, 0);
    }

    #[test]
    fn disks_alone_never_fill_the_bar() {
        let mut m = samples::running(samples::migration());
        m.progress.memory = Transfer::default();
        m.progress.disk = samples::sent(100, 100);
        assert_eq!(Shown::of(&m).percent, 50);
    }

    #[test]
    fn all_is_shown_only_once_it_is_completed() {
        let mut m = samples::completed(samples::migration());
        assert_eq!(Shown::of(&m).percent, 100);
        m.status = MigrationStatus::Running;
        assert_eq!(Shown::of(&m).percent, 99);
    }

    fn transfer() -> impl Strategy<Value = Transfer> {
        let size = || prop_oneof![Just(0), Just(u64::MAX), 0..4096_u64, any::<u64>()];
        (size(), size(), size()).prop_map(|(total_bytes, processed_bytes, remaining_bytes)| {
            Transfer {
                total_bytes,
                processed_bytes,
                remaining_bytes,
            }
        })
    }

    fn record() -> impl Strategy<Value = Migration> {
        let status = prop::sample::select(MigrationStatus::ALL);
        let eta = prop::option::of(any::<u64>());
        let transfer_of = samples::handover(TransferMode::Live);
        let of = vec![samples::migration(), samples::cold(), transfer_of];
        let of = prop::sample::select(of);
        (transfer(), transfer(), status, eta, of).prop_map(|(memory, disk, status, eta_ms, of)| {
            let mut m = samples::running(of);
            m.progress.memory = memory;
            m.progress.disk = disk;
            m.progress.eta_ms = eta_ms;
            m.status = status;
            m
        })
    }

    proptest! {
        #[test]
        fn nothing_shown_ever_runs_backwards(records in prop::collection::vec(record(), 1..40)) {
            let mut shown = Shown::default();
            for m in &records {
                let before = shown;
                shown.take(m);
                prop_assert!(shown.percent >= before.percent && shown.percent <= 100);
                for (new, old) in [(shown.disk, before.disk), (shown.memory, before.memory)] {
                    prop_assert!(new.moved >= old.moved && new.total >= old.total);
                    prop_assert!(new.moved <= new.total);
                    prop_assert!(new.per_mille >= old.per_mille && new.per_mille <= 1000);
                }
                let (bars, line) = (bars(m, &shown).join("\n"), line(m, &shown));
                let has_eta = m.progress.eta_ms.is_some() && !m.status.rests();
                prop_assert_eq!(bars.contains("ETA"), has_eta);
                prop_assert_eq!(line.contains("ETA"), has_eta);
                let percent = format!("{:>3} %", shown.percent);
                prop_assert!(bars.contains(&percent));
            }
        }
    }
}
