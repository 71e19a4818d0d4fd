//! What an agent's journal knows of a migration: the difference between *it ended
//! here so*, *it goes on here*, and *I have never heard of it*, which after the
//! loss of a journal means nothing at all.

use serde::{Deserialize, Serialize};

use crate::guest::{PowerState, Presence};
use crate::ids::StateId;

/// Where an agent sees a guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestLocation {
    /// The answer of this node's libvirt, asked now.
    pub presence: Presence,
    /// Whether a libvirt migration job runs on it here.
    pub migrating: bool,
    /// Whether it is one half of a post-copy: it has switched over, and its memory is in
    /// two places. Nothing of a node that is too old to say.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub post_copy: bool,
    /// What the agent's journal knows of the migration that was named.
    #[serde(default)]
    pub known: Known,
    /// Which state directory the agent answers from; none of an agent that is
    /// too old to say. One that is not the same as before has a new journal: what
    /// it does not know may have been all the same.
    #[serde(default)]
    pub state: Option<StateId>,
}

impl GuestLocation {
    /// What libvirt says of a guest on which no job runs, and nothing else.
    pub fn seen(presence: Presence) -> Self {
        Self {
            presence,
            migrating: false,
            post_copy: false,
            known: Known::Unsaid,
            state: None,
        }
    }

    /// Whether it stands still as the half of a post-copy that was left behind.
    pub fn is_half(&self) -> bool {
        self.post_copy && self.presence == Presence::Present(PowerState::Paused)
    }
}

/// What an agent's journal knows of a migration on its node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(tag = "journal", rename_all = "snake_case")]
pub enum Known {
    /// Nothing was ever begun for it here, as far back as this journal goes.
    Nothing,
    /// It goes on here.
    UnderWay {
        /// As what.
        doing: Doing,
    },
    /// It is over here.
    Ended {
        /// How.
        how: Ended,
    },
    /// Something was begun here, and what the journal said of it cannot be read now.
    Unreadable,
    /// Something was begun here, and what the journal said of it is gone for good.
    Lost,
    /// It does not say: the agent is too old, or its word is not understood here.
    #[default]
    #[serde(other)]
    Unsaid,
}

/// What a node is doing for a migration.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Doing {
    /// It gives a running guest away; also after the transfer, until told.
    Sending,
    /// A running guest is to come, or has come and the end was not told.
    Arriving,
    /// It gives a guest away that is off, or is to go off.
    Leaving,
    /// The same, and what it had of the guest is set aside: kept, unable to start.
    SetAside,
    /// A guest that is off is to come, or has come and is not confirmed.
    Coming,
    /// The guest changes hands here.
    Transferring,
    /// The guest of a dead node is defined here, perhaps started.
    Rebuilding,
    /// A word that is not understood here.
    #[serde(other)]
    Other,
}

/// How a migration ended on a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Ended {
    /// The guest left: what this node had of it is removed.
    Left,
    /// The guest came, and is this node's for good.
    Arrived,
    /// The guest is here as it was before.
    Stayed,
    /// What was made here for the guest is removed again.
    TakenBack,
    /// It was taken back before anything had been begun here.
    NeverBegun,
    /// The guest changed hands, and is the receiver's for good.
    HandedOver,
    /// It was over, by what was seen of the guest, and made way for another.
    MadeWay,
    /// A word that is not understood here.
    #[serde(other)]
    Other,
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::guest::PowerState;

    #[test]
    fn an_older_agents_word_and_a_newer_ones_are_read() {
        let old = json!({"presence": Presence::Absent, "migrating": false});
        let read: GuestLocation = serde_json::from_value(old).unwrap();
        assert_eq!(read, GuestLocation::seen(Presence::Absent));
        for (newer, known) in [
            (json!({"journal": "dreamt_of", "by": "whom"}), Known::Unsaid),
            (
                json!({"journal": "ended", "how": "evaporated", "at": 7}),
                Known::Ended { how: Ended::Other },
            ),
            (
                json!({"journal": "under_way", "doing": "juggling"}),
                Known::UnderWay {
                    doing: Doing::Other,
                },
            ),
        ] {
            assert_eq!(serde_json::from_value::<Known>(newer).unwrap(), known);
        }
    }

    #[test]
    fn what_is_known_comes_back_as_it_went() {
        for known in [
            Known::Unsaid,
            Known::Nothing,
            Known::Unreadable,
            Known::Lost,
            Known::UnderWay {
                doing: Doing::SetAside,
            },
            Known::Ended { how: Ended::Left },
        ] {
            let location = GuestLocation {
                known,
                state: Some(StateId::generate()),
                ..GuestLocation::seen(Presence::Present(PowerState::Running))
            };
            let text = serde_json::to_string(&location).unwrap();
            let back: GuestLocation = serde_json::from_str(&text).unwrap();
            assert_eq!(back, location);
        }
    }
}
