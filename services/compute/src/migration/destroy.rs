//! Every act of the agent after which something of a guest is no longer there:
//! definitions that are withdrawn, files that are removed or renamed away, guests
//! that are stopped hard. Nobody else calls the driver's methods for these.
//!
//! Each takes evidence, which has private fields and is made here alone, from what
//! was *seen*: a copy that stays ([`Redundant`], [`Superseded`]), or this node's own
//! journal together with its hypervisor ([`Aside`], [`Unused`], [`NeverRan`],
//! [`OtherFiles`]), or a caller's permission ([`Allowed`]). Silence, absence, an
//! idle agent and a lost journal make none.

use std::collections::BTreeSet;

use drover_model::{
    api::{
        compute::{CarriedFile, ColdPart, CopySeen, FileRole, Survivor},
        conductor::Evacuated,
        fault::Fault,
    },
    content::FileContent,
    guest::{Guest, PowerState, Presence},
    ids::{HostName, InstanceId},
    migration::ColdOptions,
};
use tokio::time::Instant;

use crate::{
    hypervisor::{Definition, HypervisorError, Overlay, Result},
    journal::{ComingRecord, KeptFile, LeavingRecord, RebuildRecord, SentFile, TransferRecord},
    node::Node,
};

/// A disk does not become shorter. Smaller files (a TPM's state) may.
const DISK_BYTES: u64 = 1 << 20;

// ---- evidence

/// Another copy of the guest stays: its node saw it whole just now.
pub(crate) struct Redundant {
    host: HostName,
    /// What it has too, by path.
    files: BTreeSet<String>,
    presence: Presence,
    /// Its journal says that it came there.
    ran_there: bool,
}

impl Redundant {
    /// Judges what the conductor hands on, against what is to go here.
    ///
    /// # Errors
    /// Refused, saying what is not proven.
    pub(crate) fn by<'a>(
        survivor: Option<&Survivor>,
        own: &HostName,
        generation: u64,
        files: impl IntoIterator<Item = &'a str>,
    ) -> std::result::Result<Self, Fault> {
        let Some(Survivor {
            host,
            copy,
            moved_on,
            ..
        }) = survivor
        else {
            return Err(Fault::refused(
                "no copy is named that stays, so nothing is removed; is the conductor older \
                 than this agent?",
            ));
        };
        if host == own {
            return Err(Fault::refused("the copy that stays is this one"));
        }
        let is_kept = copy.is_kept_aside();
        if copy.migrating || !(copy.is_whole() || is_kept) {
            let missing = copy.missing().join(", ");
            let without = match missing.is_empty() {
                true => String::new(),
                false => format!(", without {missing}"),
            };
            return Err(Fault::refused(format!(
                "{host} has no whole copy of the guest ({:?}{without}): nothing is removed",
                copy.presence
            )));
        }
        if copy.generation.is_some_and(|theirs| theirs < generation) {
            return Err(Fault::refused(format!(
                "the copy on {host} is older than the one here: nothing is removed"
            )));
        }
        let files: BTreeSet<String> = files.into_iter().map(str::to_owned).collect();
        // Of one that was moved on, whole, the names and the lengths say nothing.
        let is_whole = |path: &str| match moved_on {
            true => !copy.files.is_empty(),
            false => copy.has(path),
        };
        let missing = files.iter().find(|path| !is_whole(path));
        if let Some(missing) = missing {
            return Err(Fault::refused(format!(
                "the copy on {host} has no {missing}: nothing is removed"
            )));
        }
        Ok(Self {
            host: host.clone(),
            files,
            presence: copy.presence,
            ran_there: copy.known.ran_here,
        })
    }

    /// The same for a guest that ran here: a copy that only lies aside is older.
    pub(crate) fn by_restored<'a>(
        survivor: Option<&Survivor>,
        own: &HostName,
        files: impl IntoIterator<Item = &'a str>,
    ) -> std::result::Result<Self, Fault> {
        let proof = Self::by(survivor, own, 0, files)?;
        match proof.presence {
            Presence::Present(_) => Ok(proof),
            other => Err(Fault::refused(format!(
                "the guest ran here, and is not defined on {} ({other:?}): nothing is removed",
                proof.host
            ))),
        }
    }

    /// Where the copy is that stays.
    pub(crate) fn host(&self) -> &HostName {
        &self.host
    }

    /// Whether that copy runs.
    pub(crate) fn runs(&self) -> bool {
        self.presence == Presence::Present(PowerState::Running)
    }

    /// Whether that copy is off: no QEMU has any memory of it.
    pub(crate) fn is_off(&self) -> bool {
        matches!(self.presence, Presence::Present(state) if !state.is_active())
    }

    /// Refuses files of this node that are longer than what stays.
    ///
    /// # Errors
    /// Refused, naming the first such file.
    pub(crate) fn none_is_longer<'a>(
        survivor: Option<&Survivor>,
        here: impl IntoIterator<Item = (&'a str, u64)>,
    ) -> std::result::Result<(), Fault> {
        let Some(Survivor { host, copy, .. }) = survivor.filter(|s| !s.moved_on) else {
            return Ok(());
        };
        let longer = here.into_iter().find(|(path, bytes)| {
            let theirs = copy.length_bytes(path);
            *bytes >= DISK_BYTES
                && !path.starts_with("/dev/")
                && theirs.is_some_and(|theirs| theirs < *bytes)
        });
        match longer {
            Some((path, bytes)) => Err(Fault::refused(format!(
                "{path} has {bytes} bytes here and fewer on {host}: nothing is removed"
            ))),
            None => Ok(()),
        }
    }
}

/// A revert was asked for, and what it goes back to was seen whole: aside, or in its
/// place again, if the guest is off here.
pub(crate) struct Reverting(());

impl Reverting {
    /// Of a guest that came here, with the source's copy.
    ///
    /// # Errors
    /// Refused, saying what is not proven.
    pub(crate) fn to(
        survivor: Option<&Survivor>,
        own: &HostName,
        record: &ComingRecord,
        here: Presence,
    ) -> std::result::Result<Self, Fault> {
        let files = lasting_files(record);
        let proof = Redundant::by(survivor, own, 0, files)?;
        let kept = survivor.is_some_and(|survivor| survivor.copy.is_kept_aside());
        let is_off = matches!(here, Presence::Present(state) if !state.is_active());
        match kept || is_off {
            true => Ok(Self(())),
            false => Err(Fault::refused(format!(
                "{} keeps nothing aside to go back to: the guest is not stopped",
                proof.host
            ))),
        }
    }
}

/// The files of a guest that came, which its source has under the same paths.
fn lasting_files(record: &ComingRecord) -> impl Iterator<Item = &str> {
    let made = record.files.iter().filter(|file| file.is_made());
    let lasting = made.filter(|file| file.role != FileRole::Delta);
    lasting.map(|file| file.path.as_str())
}

/// What a source sets aside has been sent whole, is still as it was then, and its
/// definition is in the journal: it can be brought back.
pub(crate) struct Aside {
    files: Vec<KeptFile>,
}

impl Aside {
    /// From the journal, and what is here now.
    ///
    /// # Errors
    /// Refused if not all was sent, or something has changed since.
    pub(crate) fn of(record: &LeavingRecord, now: &Remaining) -> std::result::Result<Self, Fault> {
        if !record.done.contains(&ColdPart::Copy) || record.definition.is_none() {
            return Err(Fault::refused("its disks have not all been sent"));
        }
        match now.change(record) {
            None => Ok(Self {
                files: record.kept.clone(),
            }),
            Some(change) => Err(Fault::refused(format!(
                "{change} since the guest was sent (was it started or changed by hand?): it \
                 stays as it is on this node; migrate it again"
            ))),
        }
    }
}

/// What of a guest has not been set aside yet, looked at now.
pub(crate) struct Remaining {
    /// How its domain is defined; none if that is withdrawn.
    pub(crate) definition: Option<Definition>,
    /// Its own files that have their own names still.
    pub(crate) files: Vec<FileContent>,
}

impl Remaining {
    /// What is no longer as it was when it was sent, in words.
    fn change(&self, record: &LeavingRecord) -> Option<String> {
        // The journal is lost, or older: what is defined now may have run meanwhile.
        let is_unknown = record.sent_as.is_none() && !record.defines;
        if self.definition.is_some() && is_unknown {
            return Some("it may have changed (the journal does not say how it was)".to_owned());
        }
        let differs = |sent: &&SentFile| {
            let mut here = self.files.iter().filter(|file| file.path == sent.path);
            here.any(|file| file.stamp() != Some(sent.stamp.as_str()))
        };
        if let Some(sent) = record.sent.iter().find(differs) {
            return Some(format!("{} was written or replaced", sent.path));
        }
        let defined = self.definition.as_ref().zip(record.sent_as.as_ref());
        let changed = defined.is_some_and(|(now, then)| now != then);
        changed.then(|| "its definition was changed".to_owned())
    }
}

/// Files that were made here, into which nothing can have been copied.
pub(crate) struct Unused {
    files: BTreeSet<String>,
}

impl Unused {
    /// Empty files that hold the places of a transfer's disks.
    pub(crate) fn places(record: &TransferRecord, empty: impl IntoIterator<Item = String>) -> Self {
        let own = |path: &String| record.plan.disks.iter().any(|disk| disk.to == *path);
        Self {
            files: empty.into_iter().filter(own).collect(),
        }
    }
}

/// An evacuation defined the guest here and never started it.
pub(crate) struct NeverRan(());

impl NeverRan {
    /// From the journal and the hypervisor.
    ///
    /// # Errors
    /// Refused if it is active, or was, or may have been.
    pub(crate) fn of(
        record: &RebuildRecord,
        presence: Presence,
    ) -> std::result::Result<Self, Fault> {
        if presence.has_qemu() {
            let message = format!("the guest is active on this node ({presence})");
            return Err(Fault::refused(message));
        }
        match record.started {
            false => Ok(Self(())),
            true => Err(Fault::refused(
                "the guest was started on this node: its definition is not taken back",
            )),
        }
    }
}

/// The copy here is of an older generation than one that was seen elsewhere.
pub(crate) struct Superseded {
    is_active_there: bool,
}

impl Superseded {
    /// By what the conductor's answer says was seen; none if it proves nothing.
    pub(crate) fn by(evacuated: &Evacuated, own: &HostName, generation: u64) -> Option<Self> {
        let there = evacuated.host.as_ref().filter(|host| *host != own);
        let seen: &CopySeen = evacuated.seen.as_ref().filter(|_| there.is_some())?;
        let newer = seen.generation.is_some_and(|theirs| theirs > generation);
        let is_there = matches!(seen.presence, Presence::Present(_));
        (newer && is_there).then(|| Self {
            is_active_there: seen.presence.is_active(),
        })
    }

    /// Whether the newer copy is active, so that an older one must not be.
    pub(crate) fn is_active_there(&self) -> bool {
        self.is_active_there
    }
}

/// The domain uses other files than these: each has another in its place.
pub(crate) struct OtherFiles {
    files: BTreeSet<String>,
}

impl OtherFiles {
    /// From what a guest has now and after its next start: of each pair the first
    /// may go where the second is used by all, and is there.
    pub(crate) fn used<'a>(
        guests: &[Guest],
        pairs: impl IntoIterator<Item = (&'a str, &'a str)>,
        is_there: impl Fn(&str) -> bool,
    ) -> Self {
        let uses = |guest: &Guest, path: &str| {
            let mut disks = guest.disks.iter().filter_map(|disk| disk.local_path());
            disks.any(|used| used == path)
        };
        let proven = pairs.into_iter().filter(|(old, new)| {
            !guests.is_empty()
                && is_there(new)
                && guests.iter().all(|g| uses(g, new) && !uses(g, old))
        });
        Self {
            files: proven.map(|(old, _)| old.to_owned()).collect(),
        }
    }

    /// A guest that was never on the new files, and whose old ones are there.
    pub(crate) fn never_handed_over<'a>(
        record: &TransferRecord,
        pairs: impl IntoIterator<Item = (&'a str, &'a str)>,
        is_there: impl Fn(&str) -> bool,
    ) -> Self {
        use drover_model::api::compute::TransferPart;
        let begun = record.begun.contains(&TransferPart::HandOver);
        let proven = pairs.into_iter();
        let proven = proven.filter(|(_, old)| !begun && is_there(old));
        Self {
            files: proven.map(|(new, _)| new.to_owned()).collect(),
        }
    }

    /// Whether that file may go.
    pub(crate) fn covers(&self, path: &str) -> bool {
        self.files.contains(path)
    }
}

/// The caller allowed to stop the guest hard after a while, which is over.
pub(crate) struct Allowed(());

impl Allowed {
    /// By what was asked for; none if it is not allowed, or not yet.
    pub(crate) fn by(options: &ColdOptions, begun: Instant, now: Instant) -> Option<Self> {
        let after_s = options.force_stop_after_s?;
        let since_s = now.duration_since(begun).as_secs();
        (since_s >= after_s).then_some(Self(()))
    }
}

// ---- what evidence is good for

/// Evidence that a definition may go.
pub(crate) trait MayWithdraw: Sync {
    /// What of an emulated TPM's state may go with it, where libvirt cannot keep that:
    /// these files and no others; none if all of it has to stay.
    fn expendable(&self) -> Option<Vec<String>> {
        None
    }
}
impl MayWithdraw for Redundant {
    fn expendable(&self) -> Option<Vec<String>> {
        Some(self.files.iter().cloned().collect())
    }
}
impl MayWithdraw for Reverting {}
impl MayWithdraw for Aside {}
impl MayWithdraw for NeverRan {
    /// It has written no state.
    fn expendable(&self) -> Option<Vec<String>> {
        Some(Vec::new())
    }
}
impl MayWithdraw for Superseded {}

/// Evidence that files may go.
pub(crate) trait MayRemove: Sync {
    /// Whether that file is among them.
    fn covers(&self, path: &str) -> bool;
}
impl MayRemove for Redundant {
    fn covers(&self, path: &str) -> bool {
        self.files.contains(path)
    }
}
impl MayRemove for Unused {
    fn covers(&self, path: &str) -> bool {
        self.files.contains(path)
    }
}
impl MayRemove for OtherFiles {
    fn covers(&self, path: &str) -> bool {
        self.files.contains(path)
    }
}

/// Evidence that a guest may be stopped hard.
pub(crate) trait MayStop: Sync {}
impl MayStop for Allowed {}
impl MayStop for Reverting {}
impl MayStop for Superseded {}

// ---- the acts

/// Kills a QEMU that waits for a guest which stays elsewhere, and its definition.
pub(crate) async fn discard_incoming(node: &Node, id: InstanceId, _: &Redundant) -> Result<()> {
    node.hypervisor.discard_incoming(id).await
}

/// Kills a copy that libvirt left standing still after the guest had moved away: one
/// half of a post-copy, or all of what it was.
pub(crate) async fn discard_outgoing(node: &Node, id: InstanceId, proof: &Redundant) -> Result<()> {
    if !proof.runs() && !proof.is_off() {
        let words = format!("on {} the guest is neither running nor off", proof.host());
        return Err(HypervisorError::WrongState(words));
    }
    // No migration comes in there any more, so nobody needs the half.
    match node.hypervisor.discard_half(id).await {
        Err(HypervisorError::WrongState(_)) if proof.runs() || proof.ran_there => {
            node.hypervisor.discard_outgoing(id).await
        }
        other => other,
    }
}

/// Removes the definition of a guest that is off, and that moved away.
pub(crate) async fn undefine(node: &Node, id: InstanceId, _: &Redundant) -> Result<()> {
    node.hypervisor.undefine(id).await
}

/// Removes the definition of a guest that is off, snapshots' included.
pub(crate) async fn withdraw(node: &Node, id: InstanceId, proof: &impl MayWithdraw) -> Result<()> {
    match proof.expendable() {
        None => node.hypervisor.withdraw(id).await,
        Some(files) => node.hypervisor.withdraw_with_tpm(id, &files).await,
    }
}

/// Stops a guest hard.
pub(crate) async fn stop(node: &Node, id: InstanceId, _: &impl MayStop) -> Result<()> {
    node.hypervisor.stop(id).await
}

/// Whether the copy that stays has a file of its own in the place of this one, or had
/// before it was moved on. What it has none of, as its owner took the disk from the
/// guest since, is left and named.
pub(crate) fn has_its_own(survivor: Option<&Survivor>, path: &str) -> bool {
    survivor.is_none_or(|survivor| survivor.moved_on || survivor.copy.has(path))
}

/// Removes a file.
pub(crate) async fn remove(node: &Node, path: &str, proof: &impl MayRemove) -> Result<()> {
    match proof.covers(path) {
        true => node.hypervisor.remove_disk(path).await,
        false => Err(unproven(path)),
    }
}

/// Removes a file that was set aside: what it was is the guest's elsewhere. An
/// overlay goes with the image under it.
pub(crate) async fn remove_kept(
    node: &Node,
    file: &KeptFile,
    overlays: &[Overlay],
    proof: &Redundant,
) -> Result<()> {
    let overlay = overlays.iter().find(|overlay| overlay.path == file.path);
    let path = overlay.map_or(&file.path, |overlay| &overlay.image);
    match proof.covers(path) {
        true => node.hypervisor.remove_disk(&file.kept).await,
        false => Err(unproven(path)),
    }
}

/// Removes what a migration made of a guest that did not come, or was reverted.
pub(crate) async fn remove_made(node: &Node, file: &CarriedFile, proof: &Redundant) -> Result<()> {
    let image = file.over.as_ref().map(|over| &over.image);
    let path = image.unwrap_or(&file.path);
    match proof.covers(path) {
        true => node.hypervisor.remove_disk(&file.path).await,
        false => Err(unproven(path)),
    }
}

/// Removes an overlay whose image has all that was in it: the journal says so.
///
/// # Errors
/// A bug if it does not.
pub(crate) async fn remove_absorbed(
    node: &Node,
    overlay: &Overlay,
    record: &ComingRecord,
) -> Result<()> {
    match record.has_absorbed(&overlay.path) {
        true => node.hypervisor.remove_disk(&overlay.path).await,
        false => Err(unproven(&overlay.path)),
    }
}

/// Removes an overlay that its guest, which runs, no longer has.
pub(crate) async fn remove_thawed(node: &Node, overlay: &Overlay) -> Result<()> {
    // The driver refuses one that is in use.
    node.hypervisor.remove_disk(&overlay.path).await
}

/// Gives a guest's file the name that it has while it is set aside.
pub(crate) async fn rename_away(node: &Node, file: &KeptFile, proof: &Aside) -> Result<()> {
    match proof.files.contains(file) {
        true => node.hypervisor.rename_file(&file.path, &file.kept).await,
        false => Err(unproven(&file.path)),
    }
}

/// Gives it its own name back; over nothing.
pub(crate) async fn rename_back(node: &Node, file: &KeptFile) -> Result<()> {
    node.hypervisor.rename_file(&file.kept, &file.path).await
}

fn unproven(path: &str) -> HypervisorError {
    HypervisorError::Bug(format!("{path} is not among what is proven redundant"))
}

#[cfg(test)]
#[path = "destroy_tests.rs"]
mod tests;
