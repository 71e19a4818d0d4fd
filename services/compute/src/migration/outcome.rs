//! Pure: how a transfer ended, from what the hypervisor said about it or, where
//! it could not say, from what is seen of the guest here.

use drover_model::{
    api::compute::Outcome,
    guest::{PowerState, Presence},
};

use crate::hypervisor::HypervisorError;

/// Why the agent itself is ending a transfer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Intent {
    /// Somebody asked for it.
    Abort,
    /// It makes no progress.
    GiveUp {
        /// What was seen.
        why: String,
        /// Whether it lies with the guest.
        of_guest: bool,
    },
    /// To go on would do harm.
    Spare {
        /// Which, and what to do.
        why: String,
    },
}

impl Intent {
    fn outcome(&self) -> Outcome {
        match self {
            Self::Abort => Outcome::Aborted,
            Self::GiveUp { why, of_guest } => Outcome::Stalled {
                message: why.clone(),
                of_guest: *of_guest,
            },
            Self::Spare { why } => Outcome::Failed {
                message: why.clone(),
            },
        }
    }
}

/// What the hypervisor's answer means; none if it does not say (invariant 3:
/// a connection that broke tells nothing about the guest).
pub fn from_answer(
    answer: &Result<(), HypervisorError>,
    intent: Option<&Intent>,
    total_ms: u64,
) -> Option<Outcome> {
    match answer {
        Ok(()) => Some(Outcome::Moved {
            // The destination knows it.
            downtime_ms: None,
            total_ms: Some(total_ms),
        }),
        Err(HypervisorError::Lost(_) | HypervisorError::Unreachable { .. }) => None,
        Err(error) => Some(match (intent, error) {
            (Some(intent), _) => intent.outcome(),
            // Somebody aborted the job past Drover, with virsh say.
            (None, HypervisorError::Aborted(_)) => Outcome::Aborted,
            (None, error) => Outcome::Failed {
                message: error.to_string(),
            },
        }),
    }
}

/// What it means that no migration runs any more and the guest is seen so.
pub fn from_presence(presence: Presence, intent: Option<&Intent>) -> Outcome {
    let stays = |message: &str| match intent {
        Some(intent) => intent.outcome(),
        None => Outcome::Failed {
            message: message.to_owned(),
        },
    };
    match presence {
        Presence::Present(PowerState::Crashed) => stays("the guest crashed on the source"),
        Presence::Present(state) if state.is_active() => {
            stays("the migration ended unseen and the guest is still on the source")
        }
        // It may have gone off here: that it arrived is for the destination to say.
        Presence::Present(_) => {
            stays("the migration ended unseen and the guest is off on the source")
        }
        // Only the destination can tell a guest that moved from one that was taken away.
        Presence::Absent | Presence::Incoming => Outcome::Gone,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn moved(outcome: &Outcome) -> bool {
        matches!(outcome, Outcome::Moved { .. })
    }

    #[test]
    fn success_is_success_whatever_was_wanted() {
        let outcome = from_answer(&Ok(()), Some(&Intent::Abort), 5);
        assert!(moved(&outcome.unwrap()));
    }

    #[test]
    fn that_a_guest_is_gone_does_not_say_that_it_moved() {
        for intent in [None, Some(&Intent::Abort)] {
            assert_eq!(from_presence(Presence::Absent, intent), Outcome::Gone);
        }
    }

    #[test]
    fn a_broken_connection_says_nothing() {
        let lost = Err(HypervisorError::Lost("x".to_owned()));
        assert_eq!(from_answer(&lost, Some(&Intent::Abort), 5), None);
        let away = Err(HypervisorError::Unreachable {
            uri: String::new(),
            message: String::new(),
        });
        assert_eq!(from_answer(&away, None, 5), None);
    }

    #[test]
    fn what_was_wanted_names_the_failure() {
        let aborted = Err(HypervisorError::Aborted("x".to_owned()));
        let failed = Err(HypervisorError::Failed("x".to_owned()));
        let stalled = Intent::GiveUp {
            why: "y".to_owned(),
            of_guest: true,
        };
        let harmful = Intent::Spare {
            why: "z".to_owned(),
        };
        assert_eq!(from_answer(&aborted, None, 5), Some(Outcome::Aborted));
        assert_eq!(
            from_answer(&aborted, Some(&harmful), 5),
            Some(Outcome::Failed {
                message: "z".to_owned()
            })
        );
        assert_eq!(
            from_answer(&aborted, Some(&stalled), 5),
            Some(Outcome::Stalled {
                message: "y".to_owned(),
                of_guest: true,
            })
        );
        assert_eq!(
            from_answer(&failed, None, 5),
            Some(Outcome::Failed {
                message: "x".to_owned()
            })
        );
    }

    #[test]
    fn a_guest_that_is_still_defined_here_is_not_said_to_have_moved() {
        for state in [
            PowerState::Running,
            PowerState::Paused,
            PowerState::Suspended,
            PowerState::Crashed,
            PowerState::Shutdown,
        ] {
            assert!(!moved(&from_presence(Presence::Present(state), None)));
        }
    }
}
