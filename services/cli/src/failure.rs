//! What went wrong between this command and whom it asked, told for an
//! operator: what, where, what to do, and with which exit code it ends.

use std::time::Duration;

use drover_model::{api::conductor::method, check::CheckFailure, error::ErrorClass};
use drover_rpc::{DISPATCHER_MODULE, NOVA_MODULE, RemoteFailure, RpcError, TransportError};
use serde::Deserialize;
use serde_json::Value;

use crate::exit::{Exit, Place, Trouble};

/// Whom was asked, and over what.
#[derive(Debug, Clone, Copy)]
pub struct Asked<'a> {
    /// Topic and server.
    pub whom: &'a str,
    /// The broker, without its password.
    pub broker: &'a str,
}

const LOOK_AROUND: &str = "`drover doctor` tells what is wrong";

/// Tells an error of a call.
pub fn tell(error: &RpcError, asked: &Asked<'_>) -> Trouble {
    match error {
        RpcError::Remote {
            method, failure, ..
        } => remote(method, failure, asked),
        RpcError::Timeout { method, waited, .. } => silent(method, *waited, asked),
        RpcError::PeerSilent {
            method, silence, ..
        } => silent(method, *silence, asked),
        RpcError::NotSent { source, .. } => not_sent(source, asked),
        RpcError::BadReply { method, reason, .. } => unread(method, reason, asked),
        other => unclear(other),
    }
}

fn unread(method: &str, reason: &str, asked: &Asked<'_>) -> Trouble {
    let message = format!(
        "what {} answers to {method} cannot be read by this command ({}): {reason}",
        asked.whom,
        env!("CARGO_PKG_VERSION")
    );
    Trouble::new(Exit::Failed, message)
        .remedy("it may be of another version: `drover doctor` compares them")
        .place(Place::Peer)
}

fn unclear(error: &RpcError) -> Trouble {
    Trouble::new(Exit::Failed, error.to_string()).remedy(LOOK_AROUND)
}

fn silent(method: &str, waited: Duration, asked: &Asked<'_>) -> Trouble {
    let seconds = waited.as_secs_f64();
    let message = format!(
        "no answer to {method} from {} within {seconds:.0} s",
        asked.whom
    );
    Trouble::new(Exit::TimedOut, message)
        .remedy(LOOK_AROUND)
        .kind(ErrorClass::Lost)
        .place(Place::Peer)
}

/// Tells why the broker did not take a message.
pub fn not_sent(source: &TransportError, asked: &Asked<'_>) -> Trouble {
    let broker = asked.broker;
    let at_broker = |message: String, remedy: &str| {
        Trouble::new(Exit::Failed, message)
            .remedy(remedy)
            .place(Place::Broker)
    };
    match source {
        TransportError::NoRoute { .. } => nobody(asked),
        TransportError::Unavailable { reason, .. } => at_broker(
            format!("cannot reach the message broker {broker}: {reason}"),
            "is it running, and are host, user, password and virtual host in `url` of [messaging] \
             (or DROVER_URL, --url) right?",
        )
        .kind(ErrorClass::Retryable),
        TransportError::Refused { reason } => at_broker(
            format!("the message broker {broker} refuses: {reason}"),
            "check user, password and virtual host in `url` of [messaging] (or DROVER_URL, --url)",
        ),
        TransportError::Blocked { reason } => at_broker(
            format!("the message broker {broker} takes no messages: {reason}"),
            "free memory or disk on the broker's machine",
        )
        .kind(ErrorClass::Retryable),
        other => Trouble::new(Exit::Failed, other.to_string()).remedy(LOOK_AROUND),
    }
}

fn nobody(asked: &Asked<'_>) -> Trouble {
    let Asked { whom, broker } = asked;
    let remedy = match whom.strip_prefix("compute.") {
        Some(host) => format!("start drover-compute on {host}, or see its log"),
        None => "start drover-conductor, or see its log; its control_exchange and virtual host \
                 must be those of this command's configuration"
            .to_owned(),
    };
    let message = format!("nobody listens at {whom} on the broker {broker}");
    Trouble::new(Exit::TimedOut, message)
        .remedy(remedy)
        .kind(ErrorClass::Retryable)
        .place(Place::Peer)
}

fn remote(method: &str, failure: &RemoteFailure, asked: &Asked<'_>) -> Trouble {
    let (class, checks) = (failure.class.as_ref(), checks(failure));
    let mut trouble = match (failure.module.as_ref(), class) {
        // Told one by one: the message, which repeats them all, is left out.
        _ if !checks.is_empty() => {
            Trouble::refused(format!("the {} is refused", noun(method)), checks)
        }
        (NOVA_MODULE, "MigrationPreCheckError" | "NoValidHost")
        | (_, "OfferNotOpen" | "WrongKey") => Trouble::refused(words(failure), checks),
        (DISPATCHER_MODULE, "UnsupportedVersion" | "NoSuchMethod") => {
            let message = format!(
                "{} does not know this request: {}",
                asked.whom, failure.message
            );
            Trouble::new(Exit::Failed, message)
        }
        _ => Trouble::new(Exit::Failed, words(failure)),
    };
    trouble.remedy = remedy(class)
        .filter(|_| trouble.checks.is_empty())
        .map(str::to_owned);
    trouble.place = Place::Peer;
    trouble.class = Some(format!("{}.{class}", failure.module));
    trouble
}

/// What was asked for by that method, where checks can refuse it.
fn noun(method: &str) -> &'static str {
    match method {
        method::OFFER_TRANSFER => "offer",
        method::TRANSFER_INSTANCE | method::ACCEPT_TRANSFER => "transfer",
        method::DRAIN_NODE => "drain",
        method::RESTORE_NODE => "restore",
        method::EVACUATE_NODE => "evacuation",
        method::BALANCE_NODES => "balance",
        method::FORCE_DOWN | method::FORGET_NODE => "declaration",
        _ => "migration",
    }
}

fn remedy(class: &str) -> Option<&'static str> {
    Some(match class {
        "InstanceNotFound" => "`drover instance list` shows what there is",
        "ComputeHostNotFound" => "`drover node list` shows what there is",
        "MigrationNotFound" => "`drover migration list` shows what there is",
        "OperationNotFound" => "`drover operation list` shows what there is",
        "InvalidOperationState" => "`drover operation show` tells where it stands",
        "ProjectNotFound" => "`drover project list` shows what there is",
        "ProjectExists" => "`drover project set` changes it",
        "OfferNotFound" => "`drover transfer list --all` shows what there is",
        "OfferNotOpen" => "`drover transfer show` tells where it stands",
        "WrongKey" => "the giver was told the key when it offered, and can make another offer",
        "InstanceInvalidState" => {
            "`drover instance show` and `drover migration list --active` show what it is doing"
        }
        "InvalidMigrationState" => "`drover migration show` tells where it stands",
        "UnsupportedVersion" | "NoSuchMethod" => {
            "it has another version than this command; `drover doctor` compares them"
        }
        _ => return None,
    })
}

/// What the exception says; its name, if it says nothing.
fn words(failure: &RemoteFailure) -> String {
    match failure.message.trim() {
        "" => format!("{} without a message", failure.class),
        text => text.to_owned(),
    }
}

/// The failed checks that travel with a refusal of Drover's, as an array or as
/// the text of one; none with Nova's own.
fn checks(failure: &RemoteFailure) -> Vec<CheckFailure> {
    let read = match failure.kwargs.get("checks") {
        Some(Value::String(text)) => serde_json::from_str(text),
        Some(value) => Vec::deserialize(value),
        None => return Vec::new(),
    };
    read.unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::render::outcome;

    const ASKED: Asked<'static> = Asked {
        whom: "conductor",
        broker: "ctl:5672 (vhost /)",
    };

    fn told(failure: RemoteFailure) -> Trouble {
        told_of("m", failure)
    }

    fn told_of(method: &str, failure: RemoteFailure) -> Trouble {
        let error = RpcError::Remote {
            method: method.to_owned(),
            target_name: "conductor".to_owned(),
            failure,
        };
        tell(&error, &ASKED)
    }

    fn unsent(source: TransportError) -> Trouble {
        let error = RpcError::NotSent {
            method: "m".to_owned(),
            target_name: "conductor".to_owned(),
            source,
        };
        tell(&error, &ASKED)
    }

    #[test]
    fn a_refusal_brings_its_checks_as_array_or_text() {
        let checks =
            json!([{"code": "memory", "side": "destination", "message": "m", "remedy": "r"}]);
        for value in [checks.clone(), Value::from(checks.to_string())] {
            let failure = RemoteFailure::nova("MigrationPreCheckError", "cannot move: memory, m");
            let trouble = told(failure.with_kwarg("checks", value));
            assert_eq!((trouble.exit, trouble.checks.len()), (Exit::Refused, 1));
            assert_eq!(trouble.message, "the migration is refused");
        }
    }

    #[test]
    fn what_is_refused_is_called_by_its_name() {
        let checks = json!([{"code": "quota", "side": "project", "message": "m", "remedy": "r"}]);
        for (method, noun) in [
            ("transfer_instance", "transfer"),
            ("accept_transfer", "transfer"),
            ("offer_transfer", "offer"),
            ("migrate_instance", "migration"),
        ] {
            let failure = RemoteFailure::nova("MigrationPreCheckError", "quota, m");
            let trouble = told_of(method, failure.with_kwarg("checks", checks.clone()));
            assert_eq!(trouble.message, format!("the {noun} is refused"));
        }
    }

    #[test]
    fn an_offer_that_cannot_be_accepted_is_a_refusal_in_its_own_words() {
        for class in ["OfferNotOpen", "WrongKey"] {
            let trouble = told(RemoteFailure::nova(class, "2 tries are left"));
            assert_eq!(
                (trouble.exit, trouble.message.as_str()),
                (Exit::Refused, "2 tries are left")
            );
            assert!(trouble.remedy.is_some(), "{class}");
        }
    }

    #[test]
    fn a_refusal_without_checks_is_told_in_its_own_words() {
        let trouble = told(RemoteFailure::nova(
            "MigrationPreCheckError",
            "Migration pre-check error: x",
        ));
        assert_eq!(trouble.exit, Exit::Refused);
        assert_eq!(trouble.message, "Migration pre-check error: x");
        let odd = RemoteFailure::nova("MigrationPreCheckError", "x").with_kwarg("checks", 5);
        assert!(told(odd).checks.is_empty());
    }

    #[test]
    fn every_failure_of_the_conductor_says_what_to_do() {
        for class in [
            "InstanceNotFound",
            "ComputeHostNotFound",
            "MigrationNotFound",
            "InstanceInvalidState",
            "InvalidMigrationState",
            "ProjectNotFound",
            "ProjectExists",
            "OfferNotFound",
            "OperationNotFound",
            "InvalidOperationState",
        ] {
            let trouble = told(RemoteFailure::nova(class, "so it is"));
            assert_eq!(
                (trouble.exit, trouble.message.as_str()),
                (Exit::Failed, "so it is")
            );
            assert!(trouble.remedy.unwrap().contains("drover "), "{class}");
            assert_eq!(trouble.class.unwrap(), format!("nova.exception.{class}"));
        }
        let other = told(RemoteFailure::builtin("KeyError", ""));
        assert_eq!(other.message, "KeyError without a message");
    }

    #[test]
    fn nobody_there_and_no_answer_time_out() {
        let address = "conductor".to_owned();
        let trouble = unsent(TransportError::NoRoute { address });
        assert_eq!(trouble.exit, Exit::TimedOut);
        let text = outcome::trouble(&trouble);
        assert!(
            text.contains("nobody listens at conductor on the broker ctl:5672"),
            "{text}"
        );
        assert!(
            text.contains("what to do: start drover-conductor"),
            "{text}"
        );
        let late = RpcError::Timeout {
            method: "list_nodes".to_owned(),
            target_name: String::new(),
            msg_id: String::new(),
            waited: Duration::from_millis(10_002),
        };
        let trouble = tell(&late, &ASKED);
        assert_eq!(
            trouble.message,
            "no answer to list_nodes from conductor within 10 s"
        );
        assert!(trouble.kind == ErrorClass::Lost && trouble.exit == Exit::TimedOut);
    }

    #[test]
    fn a_broker_that_is_away_or_refuses_is_a_failure() {
        let away = unsent(TransportError::Unavailable {
            broker: "ctl".to_owned(),
            waited_ms: 5000,
            reason: "connection refused".to_owned(),
        });
        assert_eq!((away.exit, away.may_pass()), (Exit::Failed, true));
        assert!(
            away.message
                .ends_with("ctl:5672 (vhost /): connection refused")
        );
        let login = unsent(TransportError::Refused {
            reason: "ACCESS_REFUSED".to_owned(),
        });
        assert_eq!((login.exit, login.may_pass()), (Exit::Failed, false));
        assert!(login.remedy.unwrap().contains("password"));
    }
}
