//! Where a domain stands, from libvirt's state, reason and job.
//!
//! A domain that a migration is filling is an active one to libvirt, so state
//! alone would count two copies of a guest. The table, by moments of a move:
//!
//! | moment                          | source                    | destination               |
//! |---------------------------------|---------------------------|---------------------------|
//! | memory on its way               | running                   | paused (starting up, then migration), job in |
//! | switch-over                     | paused (migration), job out | the same                |
//! | over                            | gone, or shut off         | running (migrated)        |
//! | post-copy begins                | paused (post-copy), job out | running (post-copy), job in |
//! | post-copy broke                 | paused (post-copy failed) | paused or running (post-copy failed) |
//! | libvirtd restarted at switch-over | paused (migration), no job | killed by libvirt, or running |
//!
//! So [`Presence::Incoming`] is: paused for migration or starting up, *and* an
//! incoming job on it, *and* still so afterwards. libvirt tells the incoming job
//! by refusing its statistics with a code of its own, before it waits for
//! anything. Whatever has run here, post-copy failed or not, is never `Incoming`.

use drover_model::guest::{PowerState, Presence};
use virt::{
    domain::Domain,
    error::{Error, ErrorNumber},
    sys,
};

use super::{errors, ffi};

/// What state and reason alone say.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Standing {
    /// This, for sure.
    Certain(PowerState),
    /// A guest that waits to arrive, or one that pauses: its job tells.
    MaybeIncoming,
    /// Crashed: kept in memory, or gone. Whether it is active tells.
    Crashed,
}

/// Reads libvirt's numbers.
pub(super) fn standing(state: u32, reason: u32) -> Standing {
    let certain = Standing::Certain;
    match state {
        sys::VIR_DOMAIN_PAUSED => match reason {
            sys::VIR_DOMAIN_PAUSED_MIGRATION | sys::VIR_DOMAIN_PAUSED_STARTING_UP => {
                Standing::MaybeIncoming
            }
            _ => certain(PowerState::Paused),
        },
        sys::VIR_DOMAIN_SHUTOFF if reason == sys::VIR_DOMAIN_SHUTOFF_CRASHED => {
            certain(PowerState::Crashed)
        }
        sys::VIR_DOMAIN_SHUTOFF => certain(PowerState::Shutdown),
        sys::VIR_DOMAIN_CRASHED => Standing::Crashed,
        sys::VIR_DOMAIN_PMSUSPENDED => certain(PowerState::Suspended),
        // Running, blocked, without state, and on its way down: until libvirt
        // says *shut off* a QEMU is there and may write.
        _ => certain(PowerState::Running),
    }
}

/// Whether a paused domain is one half of a post-copy migration: its memory is
/// in two places and it must not be resumed by hand.
pub(super) fn is_split(state: u32, reason: u32) -> bool {
    state == sys::VIR_DOMAIN_PAUSED
        && matches!(
            reason,
            sys::VIR_DOMAIN_PAUSED_POSTCOPY | sys::VIR_DOMAIN_PAUSED_POSTCOPY_FAILED
        )
}

/// Whether a domain's system or QEMU has ended, and libvirt has yet to tidy up.
pub(super) fn is_going_off(state: u32, reason: u32) -> bool {
    let stands = (sys::VIR_DOMAIN_PAUSED, sys::VIR_DOMAIN_PAUSED_SHUTTING_DOWN);
    state == sys::VIR_DOMAIN_SHUTDOWN || (state, reason) == stands
}

/// How often a state that changes while it is looked at is looked at again.
const LOOKS: usize = 4;

/// Where a domain stands now; `NoDomain` if it goes meanwhile.
pub(super) fn presence(domain: &Domain) -> std::result::Result<Presence, Error> {
    for _ in 0..LOOKS {
        let (state, reason) = ffi::domain_state(domain)?;
        let power_state = match standing(state, reason) {
            Standing::Certain(power_state) => power_state,
            Standing::Crashed if domain.is_active()? => PowerState::Paused,
            Standing::Crashed => PowerState::Crashed,
            // What was waited for may have been its end.
            Standing::MaybeIncoming if !is_incoming_job(domain)? => match domain.is_active()? {
                true => PowerState::Paused,
                false => continue,
            },
            Standing::MaybeIncoming => {
                let again = ffi::domain_state(domain)?;
                if standing(again.0, again.1) == Standing::MaybeIncoming {
                    return Ok(Presence::Incoming);
                }
                continue;
            }
        };
        return Ok(Presence::Present(power_state));
    }
    // It keeps changing between the two: it is here, and it is being started.
    Ok(Presence::Present(PowerState::Paused))
}

/// Whether libvirt's job on the domain is a migration that comes in.
pub(super) fn is_incoming_job(domain: &Domain) -> std::result::Result<bool, Error> {
    match ffi::job_stats(domain, 0) {
        Ok(_) => Ok(false),
        Err(error) if errors::is(&error, ErrorNumber::OperationUnsupported) => Ok(true),
        // Not active any more, or busy with something that is no incoming
        // migration: for that one libvirt does not wait.
        Err(error)
            if errors::is(&error, ErrorNumber::OperationInvalid)
                || errors::is(&error, ErrorNumber::OperationTimeout) =>
        {
            Ok(false)
        }
        Err(error) => Err(error),
    }
}

/// The model's power state for a presence that a report needs one for.
pub(super) fn power_state(presence: Presence) -> PowerState {
    match presence {
        Presence::Present(state) => state,
        Presence::Incoming => PowerState::Paused,
        Presence::Absent => PowerState::Shutdown,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_that_may_have_run_counts_as_incoming() {
        for reason in 0..=sys::VIR_DOMAIN_PAUSED_API_ERROR + 1 {
            let waits = matches!(
                reason,
                sys::VIR_DOMAIN_PAUSED_MIGRATION | sys::VIR_DOMAIN_PAUSED_STARTING_UP
            );
            let expected = if waits {
                Standing::MaybeIncoming
            } else {
                Standing::Certain(PowerState::Paused)
            };
            assert_eq!(
                standing(sys::VIR_DOMAIN_PAUSED, reason),
                expected,
                "{reason}"
            );
        }
        for state in 0..20 {
            if state != sys::VIR_DOMAIN_PAUSED {
                assert_ne!(standing(state, 2), Standing::MaybeIncoming, "{state}");
            }
        }
    }

    #[test]
    fn only_shut_off_is_shut_down() {
        let shut = Standing::Certain(PowerState::Shutdown);
        assert_eq!(standing(sys::VIR_DOMAIN_SHUTOFF, 1), shut);
        assert_eq!(
            standing(sys::VIR_DOMAIN_SHUTDOWN, 1),
            Standing::Certain(PowerState::Running)
        );
        assert_eq!(
            standing(sys::VIR_DOMAIN_NOSTATE, 0),
            Standing::Certain(PowerState::Running)
        );
    }

    #[test]
    fn only_what_is_in_shutdown_goes_off() {
        assert!(is_going_off(sys::VIR_DOMAIN_SHUTDOWN, 0));
        assert!(is_going_off(
            sys::VIR_DOMAIN_PAUSED,
            sys::VIR_DOMAIN_PAUSED_SHUTTING_DOWN
        ));
        let reason = sys::VIR_DOMAIN_PAUSED_SHUTTING_DOWN;
        assert!(!is_going_off(sys::VIR_DOMAIN_RUNNING, reason));
        assert!(!is_going_off(sys::VIR_DOMAIN_SHUTOFF, reason));
        assert!(!is_going_off(
            sys::VIR_DOMAIN_PAUSED,
            sys::VIR_DOMAIN_PAUSED_USER
        ));
    }

    #[test]
    fn both_halves_of_a_post_copy_are_split() {
        assert!(is_split(
            sys::VIR_DOMAIN_PAUSED,
            sys::VIR_DOMAIN_PAUSED_POSTCOPY
        ));
        assert!(is_split(
            sys::VIR_DOMAIN_PAUSED,
            sys::VIR_DOMAIN_PAUSED_POSTCOPY_FAILED
        ));
        assert!(!is_split(
            sys::VIR_DOMAIN_PAUSED,
            sys::VIR_DOMAIN_PAUSED_MIGRATION
        ));
        assert!(!is_split(
            sys::VIR_DOMAIN_RUNNING,
            sys::VIR_DOMAIN_RUNNING_POSTCOPY
        ));
    }
}
