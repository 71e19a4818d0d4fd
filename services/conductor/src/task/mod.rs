//! Every operation that Drover runs, and what runs them.
//!
//! * [`live_migrate`]: a running guest to another node.
//! * [`cold_migrate`]: a guest to another node, off while it moves; then
//!   [`confirm`] or [`revert`].
//! * [`evacuate`]: a guest whose node is dead, started on another.
//! * [`transfer`]: a guest to another project on its node.
//!
//! Each lists its steps as [`steps`] says. [`journal`] turns their events into the record and the notifications; what
//! all their steps use is in [`job`]; what proves that something may go is in
//! [`proof`]; [`runner`] drives them, finds them again after a restart, and keeps
//! hold; [`tidying`] does what they put off.

pub mod cold_migrate;
pub mod confirm;
pub mod evacuate;
pub mod job;
pub mod journal;
pub mod live_migrate;
pub mod proof;
pub mod revert;
pub mod runner;
pub mod steps;
pub mod tidying;
pub mod transfer;

use drover_model::migration::{EndReason, Migration, MigrationStatus};

/// An ending that failed leaves a migration finished, as before, and says why.
fn ending_over(m: &mut Migration) {
    if m.status == MigrationStatus::Finished {
        m.ending = None;
        if let Some(reason) = m.end_reason.take() {
            m.warnings.push(format!("it stays finished: {reason}"));
        }
    } else if matches!(m.end_reason, Some(EndReason::Failed { .. })) {
        m.end_reason = None;
    }
}
