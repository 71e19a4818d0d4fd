//! How a saga lists its steps: one step is one row, and the list is what runs.
//!
//! ```text
//! steps! { Saga |it, data| until { what ends it in the middle }
//! NAME = "in the journal" [status, phase, commits, is_whole]
//!     tells "event as it begins" then "event when it is done"
//!     { what it does }
//!     undo { what takes it back };
//! ```
//!
//! While a step runs its migration has that status (`_` is that of the step before it) and, until
//! an agent says more, that phase. The success of the step that `commits` is the point of no
//! return. One that `is_whole` is not dropped in the middle when somebody ends the migration.

use drover_model::migration::{MigrationStatus, Phase};

use super::journal::Told;

/// What a step means for the migration's record, and whom it tells.
#[derive(Debug)]
pub struct Shown {
    /// Status while it runs; `None` leaves it.
    pub status: Option<MigrationStatus>,
    /// Phase while it runs, until an agent says more.
    pub phase: Phase,
    /// What is told when it begins.
    pub at_start: Option<Told>,
    /// What is told when it is done.
    pub at_success: Option<Told>,
}

/// The steps of a saga; see the [module](self).
macro_rules! steps {
    ($saga:ident |$it:ident, $data:ident| until { $until:expr }
     $($const:ident = $name:literal [$status:tt, $phase:ident $(, $flag:ident)*]
       $(tells $start:literal)? $(then $end:literal)?
       { $run:expr } $(undo { $undo:expr })?;)+) => {
        $(#[allow(dead_code)] // Not each is named elsewhere.
          const $const: &str = $name;)+
        #[async_trait::async_trait]
        impl drover_saga::Saga for $saga {
            type Data = $crate::task::job::Data;
            type Note = $crate::task::steps::Shown;

            const STEPS: &'static [drover_saga::Step<Self>] = &[$(drover_saga::Step {
                $($flag: true,)*
                $(undo: |$it, $data| {
                    let _ = (&$it, &$data);
                    Box::pin($undo)
                },)?
                ..drover_saga::Step::new(
                    $const,
                    $crate::task::steps::Shown {
                        status: $crate::task::steps::status!($status),
                        phase: drover_model::migration::Phase::$phase,
                        at_start: $crate::task::steps::told!($($start)?),
                        at_success: $crate::task::steps::told!($($end)?),
                    },
                    |$it, $data| {
                        let _ = (&$it, &$data);
                        Box::pin($run)
                    },
                )
            }),+];

            async fn interrupted(&self) -> drover_saga::StepError {
                let $it = self;
                let _ = &$it;
                $until.await
            }
        }
    };
}

macro_rules! status {
    (_) => {
        None
    };
    ($status:ident) => {
        Some(drover_model::migration::MigrationStatus::$status)
    };
}

macro_rules! told {
    () => {
        None
    };
    ($event:literal) => {
        Some($crate::task::journal::Told::info($event))
    };
}

pub(crate) use {status, steps, told};
