//! Typed ids. Parsed once at the edge; nothing inside deals in bare strings.

use std::{cell::RefCell, fmt, str::FromStr};

use serde::{Deserialize, Serialize};
use uuid::Uuid;

type Maker = Box<dyn FnMut() -> Uuid>;

thread_local! {
    static MAKER: RefCell<Option<Maker>> = const { RefCell::new(None) };
}

/// A new UUID, ordered by time of making.
pub fn fresh() -> Uuid {
    MAKER.with_borrow_mut(|maker| match maker {
        Some(make) => make(),
        None => Uuid::now_v7(),
    })
}

/// From now on this thread's new UUIDs are made so: for a simulation, which can be
/// repeated only if its ids can.
pub fn made_by(make: impl FnMut() -> Uuid + 'static) {
    MAKER.set(Some(Box::new(make)));
}

macro_rules! uuid_id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub Uuid);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.hyphenated().fmt(f)
            }
        }

        impl FromStr for $name {
            type Err = uuid::Error;
            fn from_str(text: &str) -> Result<Self, Self::Err> {
                Uuid::parse_str(text).map(Self)
            }
        }
    };
}

uuid_id!(
    /// An instance: the UUID of its libvirt domain.
    InstanceId
);
impl InstanceId {
    /// Stands where a UUID cannot be read; no instance has it.
    pub const NONE: Self = Self(Uuid::nil());
}

uuid_id!(
    /// A migration: keys every step on every node.
    MigrationId
);
uuid_id!(
    /// An offer of an instance to another project.
    OfferId
);

uuid_id!(
    /// An operation on nodes: a drain, an evacuation, ….
    OperationId
);

uuid_id!(
    /// An agent's state directory, from its making: another one is another journal.
    StateId
);

impl StateId {
    /// A new id.
    pub fn generate() -> Self {
        Self(Uuid::new_v4())
    }
}

impl OperationId {
    /// A new id, ordered by time of making.
    pub fn generate() -> Self {
        Self(fresh())
    }
}

impl OfferId {
    /// A new id, ordered by time of making.
    pub fn generate() -> Self {
        Self(fresh())
    }
}

impl MigrationId {
    /// A new id, ordered by time of making.
    pub fn generate() -> Self {
        Self(fresh())
    }
}

/// The name of a compute node: its server name on the compute topic and the
/// host part of its libvirt URI. Letters, digits, `-`, `.` and `_` only, so it
/// can stand in a routing key, a URI or a log line as it is.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct HostName(String);

/// A text that is no host name.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error(
    "'{0}' is not a host name: 1 to 253 letters, digits, '-', '.' or '_', beginning with a letter or digit"
)]
pub struct BadHostName(String);

impl HostName {
    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for HostName {
    type Err = BadHostName;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let legal = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '.' | '_');
        let starts_well = text.starts_with(|c: char| c.is_ascii_alphanumeric());
        if starts_well && text.len() <= 253 && text.chars().all(legal) {
            Ok(Self(text.to_owned()))
        } else {
            Err(BadHostName(text.chars().take(80).collect()))
        }
    }
}

impl TryFrom<String> for HostName {
    type Error = BadHostName;
    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

impl From<HostName> for String {
    fn from(name: HostName) -> Self {
        name.0
    }
}

impl fmt::Display for HostName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A project, as instances' metadata name it: any text that can be shown, as
/// those of other clouds are.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct ProjectId(String);

/// A text that is no project's id.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("'{0}' is not a project: 1 to 255 characters, none of them a control character")]
pub struct BadProjectId(String);

impl ProjectId {
    /// The id as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for ProjectId {
    type Err = BadProjectId;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let length = text.chars().count();
        let trimmed = text.trim() == text;
        if trimmed && (1..=255).contains(&length) && !text.chars().any(char::is_control) {
            Ok(Self(text.to_owned()))
        } else {
            let shown = text.chars().take(80);
            Err(BadProjectId(
                shown
                    .map(|c| if c.is_control() { '?' } else { c })
                    .collect(),
            ))
        }
    }
}

impl TryFrom<String> for ProjectId {
    type Error = BadProjectId;
    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

impl From<ProjectId> for String {
    fn from(id: ProjectId) -> Self {
        id.0
    }
}

impl fmt::Display for ProjectId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn host_names_are_safe_everywhere() {
        for good in ["kvm1", "a", "rack-1.example.org", "1node", "n_1"] {
            assert!(good.parse::<HostName>().is_ok(), "{good}");
        }
        let long = "a".repeat(254);
        for bad in ["", "-a", ".", "a b", "a/b", "a*", "a#", "ä", "a\n", &long] {
            assert!(bad.parse::<HostName>().is_err(), "{bad:?}");
        }
    }
}
