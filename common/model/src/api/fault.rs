//! How an agent says no: the failure of a step, with the class by which the
//! conductor decides what to do about it.
//!
//! On the wire it is an exception of [`MODULE`]: `code` is its class name,
//! `message` its text, and its keyword arguments hold `class`
//! (`retryable`, `refused`, `lost`, `bug` or `fenced`).

use std::{borrow::Cow, fmt};

use serde::Deserialize;
use serde_json::{Map, Value};

use crate::error::ErrorClass;

/// Module under which Drover's own exceptions travel.
pub const MODULE: &str = "drover.exception";
/// Keyword argument that holds the error class.
pub const CLASS_KWARG: &str = "class";

/// Names of the exceptions, for whoever matches on more than the class.
pub mod code {
    /// The step does not fit what is there.
    pub const STEP_REFUSED: &str = "StepRefused";
    /// Another migration has the instance.
    pub const INSTANCE_BUSY: &str = "InstanceBusy";
    /// The step cannot run now and may be asked again.
    pub const STEP_NOT_NOW: &str = "StepNotNow";
    /// The node's libvirt does not answer.
    pub const HYPERVISOR_UNREACHABLE: &str = "HypervisorUnreachable";
    /// The node's libvirt, QEMU or file system said no.
    pub const HYPERVISOR_REFUSED: &str = "HypervisorRefused";
    /// The connection to libvirt broke in the middle.
    pub const STEP_LOST: &str = "StepLost";
    /// The agent's journal cannot be written.
    pub const JOURNAL_UNWRITABLE: &str = "JournalUnwritable";
    /// The agent's journal, or a file of it, cannot be read now.
    pub const JOURNAL_UNREADABLE: &str = "JournalUnreadable";
    /// Something was begun, and the agent's journal of it is gone.
    pub const JOURNAL_LOST: &str = "JournalLost";
    /// The step came from a conductor from which the migration was taken over.
    pub const STEP_FENCED: &str = "StepFenced";
    /// A mistake in the agent.
    pub const AGENT_BUG: &str = "AgentBug";
}

/// Why a step failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fault {
    /// What may be done about it.
    pub class: ErrorClass,
    /// Class name of the exception that stands for it, one of [`code`].
    pub code: Cow<'static, str>,
    /// What happened, in words.
    pub message: String,
}

impl Fault {
    /// A clear no: the step does not fit what is there.
    pub fn refused(message: impl Into<String>) -> Self {
        Self::new(ErrorClass::Refused, code::STEP_REFUSED, message)
    }

    /// The step may be asked again.
    pub fn not_now(message: impl Into<String>) -> Self {
        Self::new(ErrorClass::Retryable, code::STEP_NOT_NOW, message)
    }

    /// A mistake in the agent.
    pub fn bug(message: impl Into<String>) -> Self {
        Self::new(ErrorClass::Bug, code::AGENT_BUG, message)
    }

    /// A fault of any class.
    pub fn new(class: ErrorClass, code: &'static str, message: impl Into<String>) -> Self {
        Self {
            class,
            code: Cow::Borrowed(code),
            message: message.into(),
        }
    }

    /// The keyword arguments of the exception that stands for it.
    pub fn kwargs(&self) -> Map<String, Value> {
        let class = match self.class {
            ErrorClass::Retryable => "retryable",
            ErrorClass::Refused => "refused",
            ErrorClass::Lost => "lost",
            ErrorClass::Bug => "bug",
            ErrorClass::Fenced => "fenced",
        };
        Map::from_iter([(CLASS_KWARG.to_owned(), Value::from(class))])
    }

    /// Reads an exception's parts back; none if it is not one of these.
    pub fn from_parts(
        module: &str,
        code: &str,
        message: &str,
        kwargs: &Map<String, Value>,
    ) -> Option<Self> {
        if module != MODULE {
            return None;
        }
        let class = ErrorClass::deserialize(kwargs.get(CLASS_KWARG)?).ok()?;
        Some(Self {
            class,
            code: Cow::Owned(code.to_owned()),
            message: message.to_owned(),
        })
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Fault {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fault_comes_back_as_it_went() {
        for class in [
            ErrorClass::Retryable,
            ErrorClass::Refused,
            ErrorClass::Lost,
            ErrorClass::Bug,
            ErrorClass::Fenced,
        ] {
            let fault = Fault::new(class, code::STEP_REFUSED, "no");
            let back = Fault::from_parts(MODULE, &fault.code, &fault.message, &fault.kwargs());
            assert_eq!(back, Some(fault));
        }
    }

    #[test]
    fn other_exceptions_are_none_of_ours() {
        let fault = Fault::refused("no");
        let kwargs = fault.kwargs();
        assert_eq!(
            Fault::from_parts("nova.exception", &fault.code, "no", &kwargs),
            None
        );
        assert_eq!(
            Fault::from_parts(MODULE, &fault.code, "no", &Map::new()),
            None
        );
        let odd = Map::from_iter([(CLASS_KWARG.to_owned(), Value::from("odd"))]);
        assert_eq!(Fault::from_parts(MODULE, &fault.code, "no", &odd), None);
    }
}
