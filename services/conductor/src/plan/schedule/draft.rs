//! What is decided about a guest of an operation, before it is said.

use drover_model::{
    check::{self, CheckFailure},
    ids::HostName,
    operation::{Item, ItemState, MoveWay, Tried, Verdict},
};

use super::{Act, Note};

/// A guest of the operation while it is decided about.
pub(super) struct Draft<'a> {
    pub(super) item: &'a Item,
    pub(super) state: ItemState,
    pub(super) tried: Option<Tried>,
    pub(super) verdict: Option<Verdict>,
    pub(super) starts: bool,
}

impl<'a> Draft<'a> {
    pub(super) fn new(item: &'a Item) -> Self {
        Self {
            item,
            state: item.state.clone(),
            tried: None,
            verdict: None,
            starts: false,
        }
    }

    pub(super) fn is_waiting(&self) -> bool {
        matches!(self.state, ItemState::Waiting { .. })
    }

    /// What came to nothing so far.
    pub(super) fn all_tried(&self) -> impl Iterator<Item = &Tried> {
        self.item.tried.iter().chain(&self.tried)
    }

    /// How and where it goes next.
    pub(super) fn target(&self) -> Option<(MoveWay, HostName)> {
        match self.verdict.as_ref().unwrap_or(&self.item.planned.verdict) {
            Verdict::Moves { way, to, .. } => Some((*way, to.clone())),
            Verdict::Stays { .. } => None,
        }
    }

    /// What is to be written down, if anything is.
    pub(super) fn note(&self) -> Option<Act> {
        let new = self.state != self.item.state || self.tried.is_some() || self.verdict.is_some();
        new.then(|| {
            Act::Note(Note {
                instance: self.item.planned.instance,
                state: self.state.clone(),
                tried: self.tried.clone(),
                verdict: self.verdict.clone(),
            })
        })
    }
}

/// Nothing is left to try.
pub(super) fn given_up(draft: &Draft<'_>, reasons: &[CheckFailure]) -> ItemState {
    let found = check::texts(reasons);
    let last = draft.all_tried().last();
    match (last, found.is_empty()) {
        (None, _) => ItemState::Stays {
            reason: found,
            blocks: true,
        },
        (Some(tried), true) => ItemState::Failed {
            reason: tried.reason.clone(),
        },
        (Some(tried), false) => ItemState::Failed {
            reason: format!("{}; then {found}", tried.reason),
        },
    }
}

/// A verdict of staying, as a state.
pub(super) fn stays(verdict: &Verdict) -> ItemState {
    let (reasons, blocks) = match verdict {
        Verdict::Stays { reasons, blocks } => (reasons.as_slice(), *blocks),
        Verdict::Moves { .. } => (&[][..], true),
    };
    let reasons: Vec<&str> = reasons.iter().map(|r| r.message.as_str()).collect();
    ItemState::Stays {
        reason: reasons.join("; "),
        blocks,
    }
}

/// It is in nobody's way any more.
pub(super) fn gone(reason: String) -> ItemState {
    ItemState::Stays {
        reason,
        blocks: false,
    }
}
