//! Proof that a copy of a guest, or a part of one, may go: the only way to ask an
//! agent for a step that removes, withdraws or stops something.
//!
//! | what goes | what must have been seen, now, by the nodes themselves |
//! |---|---|
//! | what a live migration made at its destination | the guest never came there; it is whole on its source, or where it has moved since |
//! | what a live migration left at its source | it is whole on its destination, or where it has moved since |
//! | what a cold migration made at its destination | the guest never ran there; it is whole on its source, or kept aside there whole |
//! | a guest that is reverted | all that it goes back to lies aside on the source, and nothing is in its place there |
//! | the files of a guest that was reverted | it is whole on the source, defined or active |
//! | a guest that was reverted while its destination was dead | the same, and it is off there as it died |
//! | what a source keeps aside | it is whole on the destination, or where it has moved since |
//! | what an evacuation defined | it was never started there |
//!
//! Absence, silence, an agent that knows nothing and an error make no proof: what
//! is not proven stays, and is asked about again.

use drover_model::{
    api::compute::{CopySeen, Survivor},
    guest::{PowerState, Presence},
    ids::{HostName, MigrationId},
};

/// A node's own answer about its copy.
#[derive(Debug, Clone)]
pub struct Seen {
    migration: MigrationId,
    host: HostName,
    at_ms: u64,
    copy: CopySeen,
}

impl Seen {
    /// As the node answered when it was asked for that migration.
    pub(super) fn new(migration: MigrationId, host: HostName, at_ms: u64, copy: CopySeen) -> Self {
        Self {
            migration,
            host,
            at_ms,
            copy,
        }
    }

    /// What it saw.
    pub(super) fn copy(&self) -> &CopySeen {
        &self.copy
    }

    /// Whether the guest's one running copy is there.
    pub(super) fn is_active(&self) -> bool {
        self.copy.presence.is_active()
    }

    /// Whether the domain is there, in whatever state.
    pub(super) fn is_present(&self) -> bool {
        matches!(self.copy.presence, Presence::Present(_))
    }

    /// Whether the guest lies aside there: another node may have been told to start it.
    pub(super) fn was_set_aside(&self) -> bool {
        self.copy.aside.is_some()
    }

    /// In words, for people.
    pub(super) fn words(&self) -> String {
        let (host, presence) = (&self.host, self.copy.presence);
        let mut words = format!("on {host} it is {presence}");
        if self.copy.is_kept_aside() {
            words.push_str(", kept aside");
        }
        let missing = self.copy.missing();
        if !missing.is_empty() {
            words = format!("{words}, without {}", missing.join(", "));
        }
        words
    }

    fn survives(&self, moved_on: bool) -> Survivor {
        Survivor {
            host: self.host.clone(),
            seen_at_ms: self.at_ms,
            copy: self.copy.clone(),
            // What lies aside is as it was.
            moved_on: moved_on && self.is_present(),
        }
    }
}

/// A copy may go, as this one stays.
#[derive(Debug, Clone)]
pub struct Redundant {
    migration: MigrationId,
    survivor: Survivor,
}

impl Redundant {
    /// The copy that stays, for the agent to judge itself.
    pub fn survivor(&self) -> Survivor {
        self.survivor.clone()
    }

    /// Whether that copy runs.
    pub fn runs(&self) -> bool {
        self.survivor.copy.presence == Presence::Present(PowerState::Running)
    }

    /// Of which migration.
    pub fn migration(&self) -> MigrationId {
        self.migration
    }

    fn by(survivor: &Seen, moved_on: bool) -> Self {
        Self {
            migration: survivor.migration,
            survivor: survivor.survives(moved_on),
        }
    }
}

/// Whether what a migration made at its destination may go.
#[derive(Debug, Clone)]
pub enum TakeBack {
    /// It may.
    Redundant(Box<Redundant>),
    /// Never: the guest is there, or was.
    Stays(String),
    /// Nobody shows a copy that would stay.
    Unproven(String),
}

/// What a live migration made at its destination. `stays` is where the guest is
/// taken to be; `moved_on` if it has been moved since.
pub fn live_destination(source: &Seen, stays: &Seen, dest: &Seen, moved_on: bool) -> TakeBack {
    let runs_on_source = source.copy.presence == Presence::Present(PowerState::Running);
    if dest.is_active() && !runs_on_source {
        return TakeBack::Stays(format!("the guest is on {}", dest.host));
    }
    if dest.is_present() || dest.copy.known.ran_here || source.copy.known.moved_away {
        return TakeBack::Stays(format!("the guest was on {}", dest.host));
    }
    match is_whole_elsewhere(stays, dest) {
        true => TakeBack::Redundant(Box::new(Redundant::by(stays, moved_on))),
        false => TakeBack::Unproven(unproven(stays, dest)),
    }
}

/// What a live migration left at its source.
///
/// # Errors
/// In words, what is not proven.
pub fn live_source(source: &HostName, stays: &Seen) -> Result<Redundant, String> {
    whole_elsewhere(source, stays, false)
}

/// What a cold migration made at its destination, before the guest was seen there;
/// `moved_on` if it has been moved since.
pub fn cold_destination(stays: &Seen, dest: &Seen, moved_on: bool) -> TakeBack {
    if dest.is_active() || dest.copy.known.ran_here {
        return TakeBack::Stays(format!(
            "the guest is or was active on {}: {}",
            dest.host,
            dest.words()
        ));
    }
    let whole = stays.copy.is_whole() || stays.copy.is_kept_aside();
    match is_other(stays, dest) && whole && !stays.copy.migrating {
        true => TakeBack::Redundant(Box::new(Redundant::by(stays, moved_on))),
        false => TakeBack::Unproven(unproven(stays, dest)),
    }
}

/// A guest that is to be reverted: what its source keeps.
///
/// # Errors
/// In words, what it lacks.
pub fn way_back(source: &Seen) -> Result<Redundant, String> {
    let host = &source.host;
    if source.copy.presence != Presence::Absent {
        return Err(is_back(source));
    }
    let taken = source.copy.aside.iter().flat_map(|aside| &aside.taken);
    let taken: Vec<&str> = taken.map(String::as_str).collect();
    if !taken.is_empty() {
        return Err(format!(
            "{host} has other files where the guest's were, or another guest uses its devices: {}; \
             make way there, and ask again",
            taken.join(", ")
        ));
    }
    if source.copy.is_kept_aside() {
        return Ok(Redundant::by(source, false));
    }
    Err(match &source.copy.aside {
        None => format!(
            "{host} keeps nothing aside of it (did its agent lose its state, or was the node \
             installed anew?)"
        ),
        Some(aside) if !aside.complete || !aside.defined => {
            format!("{host} has not all of it aside")
        }
        Some(_) => format!(
            "{host} kept it aside and lacks {}",
            source.copy.missing().join(", ")
        ),
    })
}

/// A guest that somebody has brought back to its source past Drover: it is defined there,
/// and absent on its destination by that node's own word. Nothing goes by that.
///
/// # Errors
/// In words, why it has not come back, or not alone.
pub fn brought_back(source: &Seen, dest: &Seen) -> Result<(), String> {
    let aside = source.copy.aside.as_ref();
    if aside.is_some_and(|aside| !aside.complete) {
        return Err(format!("{} has not all of it aside", source.host));
    }
    match dest.copy.presence {
        Presence::Absent => Ok(()),
        Presence::Incoming | Presence::Present(_) => Err(on_both(source, dest)),
    }
}

/// The files of a guest that was reverted.
pub fn reverted(stays: &Seen, dest: &Seen) -> TakeBack {
    if dest.is_present() || dest.copy.presence == Presence::Incoming {
        return TakeBack::Stays(format!("the guest is on {} again", dest.host));
    }
    match is_whole_elsewhere(stays, dest) {
        true => TakeBack::Redundant(Box::new(Redundant::by(stays, false))),
        false => TakeBack::Unproven(unproven(stays, dest)),
    }
}

/// A guest that was reverted while its destination was dead, and is off there as it
/// died; none if it is anything else.
pub fn reverted_before(stays: &Seen, dest: &Seen) -> Option<Redundant> {
    let is_off = dest.is_present() && !dest.is_active() && dest.copy.known.under_way;
    (is_off && is_whole_elsewhere(stays, dest)).then(|| Redundant::by(stays, false))
}

/// What a source keeps aside; `moved_on` if the guest has been moved since.
///
/// # Errors
/// In words, what is not proven.
pub fn kept_aside(source: &HostName, stays: &Seen, moved_on: bool) -> Result<Redundant, String> {
    whole_elsewhere(source, stays, moved_on)
}

/// The destination's copy has whatever the source keeps, and is in place.
///
/// # Errors
/// In words, what it lacks.
pub fn may_confirm(source: Option<&Seen>, dest: &Seen) -> Result<(), String> {
    let host = &dest.host;
    if let Some(source) = source.filter(|source| source.is_present()) {
        return Err(match dest.copy.presence {
            Presence::Absent => format!(
                "{}, and it is not on {host} any more: ask for revert, which ends the move and \
                 leaves everything as it is",
                is_back(source)
            ),
            Presence::Incoming | Presence::Present(_) => on_both(source, dest),
        });
    }
    if !dest.copy.is_whole() {
        return Err(format!("{host} has no whole copy of it: {}", dest.words()));
    }
    let kept = source.and_then(|seen| seen.copy.aside.as_ref());
    let mut kept = kept.into_iter().flat_map(|aside| &aside.files);
    match kept.find(|file| file.exists && !dest.copy.has(&file.path)) {
        Some(file) => Err(format!("the guest on {host} has no {}", file.path)),
        None => Ok(()),
    }
}

/// An evacuation's definition was never started.
#[derive(Debug, Clone, Copy)]
pub struct NeverRan(());

impl NeverRan {
    /// As its new home says.
    ///
    /// # Errors
    /// In words, why that is not so.
    pub fn there(home: &Seen) -> Result<Self, String> {
        let copy = &home.copy;
        let may_go = match copy.presence {
            // Nothing is there that could be taken back.
            Presence::Absent => true,
            Presence::Incoming => false,
            Presence::Present(state) => !state.is_active() && !copy.known.ran_here,
        };
        match may_go {
            true => Ok(Self(())),
            false => Err(format!("the guest was started on {}", home.host)),
        }
    }
}

fn whole_elsewhere(source: &HostName, stays: &Seen, moved_on: bool) -> Result<Redundant, String> {
    match stays.host != *source && stays.copy.is_whole() && !stays.copy.migrating {
        true => Ok(Redundant::by(stays, moved_on)),
        false => Err(format!(
            "no whole copy of the guest was seen elsewhere, so {source} keeps what it has: {}",
            stays.words()
        )),
    }
}

/// Somebody has brought a guest back to its source, in words.
pub(super) fn is_back(source: &Seen) -> String {
    let (host, presence) = (&source.host, source.copy.presence);
    format!("somebody has brought the guest to {host} again ({presence})")
}

fn on_both(source: &Seen, dest: &Seen) -> String {
    let (here, there) = (&source.host, &dest.host);
    format!(
        "{}, and it is on {there} too ({}): undefine the one that is not wanted, and ask for \
         revert if it stays on {here}, or for confirm if it stays on {there}",
        is_back(source),
        dest.copy.presence
    )
}

fn is_whole_elsewhere(stays: &Seen, goes: &Seen) -> bool {
    is_other(stays, goes) && stays.copy.is_whole() && !stays.copy.migrating
}

fn is_other(stays: &Seen, goes: &Seen) -> bool {
    stays.host != goes.host && stays.migration == goes.migration
}

fn unproven(stays: &Seen, goes: &Seen) -> String {
    format!(
        "no whole copy of the guest was seen, so {} keeps what it has: {}",
        goes.host,
        stays.words()
    )
}

#[cfg(test)]
#[path = "proof_tests.rs"]
mod tests;
