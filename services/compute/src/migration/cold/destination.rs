//! The destination's steps of a cold migration: files reserved and taken in, the
//! guest defined and started, kept for good or given back. It never touches what
//! a migration did not make here.

use drover_model::{
    api::{
        compute::{
            CarriedFile, CleanUp, ColdPart, Ended, FileRole, FileSeen, FinishResize, GuestLocation,
            Inbox, PrepResize, RemoveCopy, RevertResize, StepRef,
        },
        fault::Fault,
    },
    content::CheckedFile,
    error::ErrorClass,
    guest::Presence,
    ids::InstanceId,
};
use tracing::{info, warn};

use super::{
    super::{
        actor::{Actor, Stage},
        contents::{are_all_checked, are_as_checked},
        destroy::{self, Redundant, Reverting},
    },
    files,
};
use crate::{
    faults::hypervisor as fault,
    hypervisor::{HypervisorError, Incoming, Overlay},
    journal::{ComingFile, ComingRecord, Inodes, Record, definition, token},
};

impl Actor {
    /// Makes ready for a guest that comes shut off: empty files for its bytes,
    /// and the door open for them.
    pub(in super::super) async fn prep_resize(&mut self, step: PrepResize) -> Result<Inbox, Fault> {
        let reference = self.step(step.instance);
        self.same_instance(reference)?;
        let (mut record, first) = match &self.stage {
            // Begun by a former life of the agent, or broken off by a fault.
            Stage::Coming(record) => ((**record).clone(), false),
            Stage::Idle => (self.begin_coming(&step).await?, true),
            _ => return Err(Fault::refused("this node is the migration's source")),
        };
        let is_own = |path: &String| record.files.iter().any(|file| file.path == *path);
        if let Some(other) = step.files.iter().find(|file| !is_own(&file.path)) {
            return Err(Fault::refused(format!(
                "somebody has put another file at {}",
                other.path
            )));
        }
        if !record.prepared {
            self.reserve(&mut record, first).await?;
        }
        self.open(&record).await
    }

    async fn begin_coming(&mut self, step: &PrepResize) -> Result<ComingRecord, Fault> {
        self.may_begin(self.step(step.instance)).await?;
        files::check(&step.files)?;
        let reference = self.step(step.instance);
        self.registry.hold(reference).await?;
        let begun = async {
            let record = ComingRecord {
                instance: step.instance,
                files: step.files.iter().map(ComingFile::from).collect(),
                token: token(),
                prepared: false,
                definition: None,
                ran_here: false,
                arrived: false,
                reverted: None,
                inodes: Inodes::new(),
                absorbed: Vec::new(),
            };
            self.registry.claim(self.migration, &record.places())?;
            self.nothing_is_here_yet(&record).await?;
            self.write_coming(&record).await?;
            Ok(record)
        };
        match begun.await {
            Ok(record) => {
                self.stage = Stage::Coming(Box::new(record.clone()));
                Ok(record)
            }
            Err(fault) => {
                self.registry.release(reference);
                Err(fault)
            }
        }
    }

    /// What is found later at these places is then the migration's own.
    async fn nothing_is_here_yet(&self, record: &ComingRecord) -> Result<(), Fault> {
        let hypervisor = &self.node.hypervisor;
        let presence = hypervisor.presence(record.instance).await.map_err(fault)?;
        if presence != Presence::Absent {
            let message = format!("the instance is on this node already ({presence})");
            return Err(Fault::refused(message));
        }
        let paths: Vec<String> = record.files.iter().map(|f| f.path.clone()).collect();
        let facts = hypervisor.file_facts(&paths).await.map_err(fault)?;
        for (file, fact) in record.files.iter().zip(facts) {
            if file.role == FileRole::Device && fact.in_use {
                return Err(Fault::refused(format!(
                    "a guest of this node, or the node itself, uses {}",
                    file.path
                )));
            }
            // Also one that is not there: its guest would find this one's in its place.
            if file.is_made() && fact.in_use {
                return Err(Fault::refused(format!(
                    "another guest of this node uses {}, which this one would write",
                    file.path
                )));
            }
            if fact.exists != file.must_exist() {
                let is = if fact.exists {
                    "is there already"
                } else {
                    "is no longer there"
                };
                return Err(Fault::refused(format!("{} {is}", file.path)));
            }
        }
        Ok(())
    }

    async fn write_coming(&self, record: &ComingRecord) -> Result<(), Fault> {
        let entry = Record::Coming(Box::new(record.clone()));
        self.write_down(&entry).await
    }

    async fn reserve(&mut self, record: &mut ComingRecord, first: bool) -> Result<(), Fault> {
        let made = record.files.iter().filter(|file| file.is_made());
        for file in made.cloned().collect::<Vec<_>>() {
            let with_directory = file.role == FileRole::Tpm;
            if !self.hold_place(&file.path, with_directory, first).await? {
                record.files.retain(|other| other.path != file.path);
                self.keep_coming(record.clone()).await?;
                return Err(fault(HypervisorError::Exists(file.path)));
            }
        }
        let path = files::definition_path(&self.node.settings.state_dir, self.migration);
        definition::reserve(&path).await?;
        // The others may be replaced by who uses them.
        let images = record.files.iter().filter(|file| file.is_made());
        let images = images.filter(|file| !matches!(file.role, FileRole::Nvram | FileRole::Tpm));
        let images = images.map(|file| file.path.clone()).collect();
        record.inodes = self.inodes(images).await?;
        record.prepared = true;
        self.write_coming(record).await?;
        self.stage = Stage::Coming(Box::new(record.clone()));
        info!(migration = %self.migration, instance = %record.instance,
            files = record.files.len(), "ready for the guest's files to come");
        Ok(())
    }

    /// Opens the door to what was reserved.
    async fn open(&self, record: &ComingRecord) -> Result<Inbox, Fault> {
        let hypervisor = &self.node.hypervisor;
        for part in [ColdPart::PreCopy, ColdPart::Copy] {
            let incoming = self.incoming(record, part);
            let key = files::key(self.migration, part);
            if !incoming.is_empty() {
                let opened = hypervisor.receive(key, &record.token, &incoming).await;
                opened.map_err(fault)?;
            }
        }
        let port = hypervisor.disk_port().map_err(Fault::not_now)?;
        Ok(Inbox {
            port,
            token: record.token.clone(),
        })
    }

    fn incoming(&self, record: &ComingRecord, part: ColdPart) -> Vec<Incoming> {
        let listed: Vec<CarriedFile> = record.files.iter().map(CarriedFile::from).collect();
        let mut incoming: Vec<Incoming> = files::of_part(&listed, part)
            .map(|file| Incoming {
                path: file.path.clone(),
                present: file.present,
            })
            .collect();
        if part == ColdPart::Copy {
            let path = files::definition_path(&self.node.settings.state_dir, self.migration);
            incoming.push(Incoming {
                path: path.display().to_string(),
                present: false,
            });
        }
        incoming
    }

    /// After a restart: whoever sends finds the door open again.
    pub(in super::super) async fn reopen(&self) {
        if let Stage::Coming(record) = &self.stage
            && record.prepared
            && record.definition.is_none()
            && let Err(error) = self.open(record).await
        {
            warn!(migration = %self.migration, %error, "files cannot be taken in for now");
        }
    }

    async fn close(&self) {
        for part in [ColdPart::PreCopy, ColdPart::Copy] {
            let key = files::key(self.migration, part);
            self.node.hypervisor.stop_receiving(key).await;
        }
    }

    /// Defines the guest that has come, and starts it if it is to run. Once it was
    /// here so, nothing is done any more, but to take back a revert.
    pub(in super::super) async fn finish_resize(
        &mut self,
        step: FinishResize,
    ) -> Result<GuestLocation, Fault> {
        let record = self.coming(step.instance)?.clone();
        if record.arrived && record.reverted.is_none() {
            return self.location(step.instance).await;
        }
        self.close().await;
        let presence = self.node.hypervisor.presence(step.instance).await;
        let presence = presence.map_err(fault)?;
        if !presence.is_active() {
            self.define_what_came(&step, presence).await?;
            if let Some(checked) = &step.checked {
                self.nothing_has_changed(step.instance, checked).await?;
            }
            if step.start && record.reverted != Some(false) {
                self.start_what_came(step.instance).await?;
            }
        }
        let mut record = self.coming(step.instance)?.clone();
        record.ran_here |= presence.is_active();
        record.arrived = true;
        record.reverted = None;
        self.keep_coming(record).await?;
        let location = self.location(step.instance).await?;
        info!(migration = %self.migration, instance = %step.instance,
            presence = ?location.presence, "the guest has come");
        Ok(location)
    }

    async fn define_what_came(
        &mut self,
        step: &FinishResize,
        presence: Presence,
    ) -> Result<(), Fault> {
        let mut record = self.coming(step.instance)?.clone();
        let definition = match record.definition.clone() {
            Some(definition) => definition,
            None if presence != Presence::Absent => {
                return Err(Fault::refused(format!(
                    "somebody else has defined the guest on this node ({presence}): that \
                     definition is not replaced"
                )));
            }
            None => {
                let state_dir = &self.node.settings.state_dir;
                let path = files::definition_path(state_dir, self.migration);
                let came = definition::read(&path).await?;
                record.definition = Some(came.clone());
                // From here on nothing more is taken in.
                self.keep_coming(record.clone()).await?;
                came
            }
        };
        let listed: Vec<CarriedFile> = record.files.iter().map(CarriedFile::from).collect();
        for overlay in files::overlays(&listed) {
            self.absorb(&mut record, &overlay).await?;
        }
        if record.reverted.is_none() {
            self.all_are_in_place(&record).await?;
        }
        // As it was here, if it was: its size is in it already.
        let flavor = step.flavor.filter(|_| record.reverted.is_none());
        let defined = self.node.hypervisor.define(&definition, flavor).await;
        defined.map_err(fault)
    }

    /// Has an overlay merged into its image, and removes it. Which is merged is written down
    /// in between: of one that is not there, and of which that is not known, what was in it
    /// is lost here.
    async fn absorb(&mut self, record: &mut ComingRecord, overlay: &Overlay) -> Result<(), Fault> {
        let hypervisor = self.node.hypervisor.clone();
        let path = &overlay.path;
        let seen = hypervisor.file_facts(std::slice::from_ref(path)).await;
        let is_here = seen.map_err(fault)?.iter().any(|file| file.exists);
        if !record.has_absorbed(path) {
            if !is_here {
                return Err(Fault::refused(format!(
                    "{path} came here with what the guest wrote last, and is missing before it \
                     is known to be merged into {}: the guest is not defined",
                    overlay.image
                )));
            }
            hypervisor.merge_overlay(overlay).await.map_err(fault)?;
            record.absorbed.push(path.clone());
            self.keep_coming(record.clone()).await?;
        }
        match is_here {
            true => {
                let removed = destroy::remove_absorbed(&self.node, overlay, record).await;
                removed.map_err(fault)
            }
            false => Ok(()),
        }
    }

    /// Refuses to define a guest one of whose files somebody has removed or emptied
    /// since it came.
    async fn all_are_in_place(&self, record: &ComingRecord) -> Result<(), Fault> {
        let lasting = record.files.iter().filter(|f| f.role != FileRole::Delta);
        let paths = lasting.clone().map(|file| (&file.path, &file.path));
        let seen = self.see_files(paths).await?;
        // What lies beside the disks may be empty.
        let is_here = |file: &ComingFile, seen: &FileSeen| match file.role {
            FileRole::Tpm | FileRole::Nvram => seen.exists,
            _ => seen.is_in_place(),
        };
        let mut both = lasting.zip(&seen);
        match both.find(|(file, seen)| !is_here(file, seen)) {
            None => Ok(()),
            Some((ComingFile { path, .. }, _)) => Err(Fault::refused(format!(
                "{path} came here, and is missing or empty now: the guest is not defined"
            ))),
        }
    }

    /// From before the start on the guest counts as one that ran here, unless the
    /// hypervisor refused to start it.
    async fn start_what_came(&mut self, instance: InstanceId) -> Result<(), Fault> {
        let mut record = self.coming(instance)?.clone();
        let ran_before = record.ran_here;
        if !ran_before {
            record.ran_here = true;
            self.keep_coming(record.clone()).await?;
        }
        let hypervisor = self.node.hypervisor.clone();
        let Err(error) = hypervisor.start(instance).await else {
            return Ok(());
        };
        if error.class() == ErrorClass::Refused && !ran_before {
            let presence = hypervisor.presence(instance).await.map_err(fault)?;
            if !presence.is_active() {
                record.ran_here = false;
                self.keep_coming(record).await?;
            }
        }
        Err(fault(error))
    }

    async fn keep_coming(&mut self, record: ComingRecord) -> Result<(), Fault> {
        self.write_coming(&record).await?;
        self.stage = Stage::Coming(Box::new(record));
        Ok(())
    }

    /// Whether what the guest uses here is what was looked at, or was carried.
    async fn nothing_has_changed(
        &self,
        instance: InstanceId,
        checked: &[CheckedFile],
    ) -> Result<(), Fault> {
        let hypervisor = &*self.node.hypervisor;
        are_as_checked(hypervisor, checked).await?;
        let defined = hypervisor.lasting_guest(instance).await.map_err(fault)?;
        let Some(guest) = defined else {
            return Err(Fault::not_now("the guest is no longer defined here"));
        };
        let files = &self.coming(instance)?.files;
        are_all_checked(&guest, checked, |path| files.iter().any(|f| f.path == path))
    }

    fn coming(&self, instance: InstanceId) -> Result<&ComingRecord, Fault> {
        self.same_instance(self.step(instance))?;
        match &self.stage {
            Stage::Coming(record) => Ok(record),
            _ => Err(Fault::refused(
                "nothing has come to this node for this migration",
            )),
        }
    }

    /// Takes back what this migration made here, by evidence of the copy that stays.
    /// Refused if the guest is active here, or ran here and was not reverted.
    pub(in super::super) async fn rollback_resize(
        &mut self,
        ask: RemoveCopy,
    ) -> Result<CleanUp, Fault> {
        let step = self.step(ask.instance);
        self.same_instance(step)?;
        if matches!(self.stage, Stage::Idle) {
            return self.never_begun(step).await;
        }
        let record = self.coming(step.instance)?.clone();
        let presence = self.node.hypervisor.presence(step.instance).await;
        let presence = presence.map_err(fault)?;
        if presence.has_qemu() {
            let message = format!("the guest is active on this node ({presence})");
            return Err(Fault::refused(message));
        }
        // Of what came alone the other copy has none: its owner took the disk from the guest.
        let made = self.made_here(&record).await?;
        let replaced = self.replaced(&record.inodes).await?;
        let (twice, alone): (Vec<&ComingFile>, Vec<&ComingFile>) = made.iter().partition(|f| {
            let image = f.over.as_ref().map_or(&f.path, |over| &over.image);
            destroy::has_its_own(ask.survivor.as_ref(), image) && !replaced.contains(&f.path)
        });
        let lasting = twice.iter().filter(|f| f.role != FileRole::Delta);
        let lasting = lasting.map(|file| &*file.path).collect();
        let proof = self.another_stays(&ask, &record, presence, lasting)?;
        self.close().await;
        let withdrawn = destroy::withdraw(&self.node, step.instance, &proof).await;
        withdrawn.map_err(fault)?;
        let alone = alone.iter().map(|file| file.path.clone()).collect();
        let mut clean_up = CleanUp {
            kept: self.left_here(alone, &replaced).await?,
            ..CleanUp::default()
        };
        // Disks before what lies under them.
        for own in [true, false] {
            for file in &twice {
                if files::is_own(file.role) != own {
                    continue;
                }
                if let Some(other) = self.registry.who_lies_over(&file.path, self.migration) {
                    clean_up.warnings.push(format!(
                        "{} was not removed: the guest of migration {other}, which lies aside on \
                         this node, needs it",
                        file.path
                    ));
                    continue;
                }
                let file = CarriedFile::from(*file);
                let removed = destroy::remove_made(&self.node, &file, &proof).await;
                self.note_removed(&file.path, removed, &mut clean_up)?;
            }
        }
        let path = files::definition_path(&self.node.settings.state_dir, self.migration);
        definition::remove(&path).await?;
        info!(migration = %self.migration, instance = %step.instance,
            removed = ?clean_up.removed, "took back what was made for the guest");
        self.forget_if_clean(step, Ended::TakenBack, clean_up).await
    }

    /// The files that the migration has made. Until all are reserved nothing comes, and
    /// what is not empty is somebody else's.
    async fn made_here(&self, record: &ComingRecord) -> Result<Vec<ComingFile>, Fault> {
        let mut made = Vec::new();
        for file in record.files.iter().filter(|file| file.is_made()) {
            if record.prepared || self.is_empty(&file.path).await? {
                made.push(file.clone());
            }
        }
        Ok(made)
    }

    fn another_stays(
        &self,
        ask: &RemoveCopy,
        record: &ComingRecord,
        presence: Presence,
        files: Vec<&str>,
    ) -> Result<Redundant, Fault> {
        let (survivor, own) = (ask.survivor.as_ref(), &self.node.settings.host);
        if presence != Presence::Absent && record.definition.is_none() {
            return Err(Fault::refused(
                "somebody else has defined the guest on this node: nothing is removed",
            ));
        }
        if !record.ran_here {
            return Redundant::by(survivor, own, 0, files);
        }
        match (record.reverted, presence) {
            // Withdrawn when it was reverted: whoever defined it since wants it here.
            (Some(_), Presence::Absent) => Redundant::by_restored(survivor, own, files),
            _ => Err(Fault::refused(format!(
                "the guest ran on this node ({presence} now): nothing of it is taken back"
            ))),
        }
    }

    /// What came is on stable storage and the guest's for good. Of one that somebody has
    /// taken away since, what is left here is named.
    pub(in super::super) async fn confirm_at_destination(
        &mut self,
        step: StepRef,
    ) -> Result<CleanUp, Fault> {
        self.same_instance(step)?;
        let hypervisor = self.node.hypervisor.clone();
        let presence = hypervisor.presence(step.instance).await.map_err(fault)?;
        // One that had come and was moved on by hand needs nothing of this node any more;
        // whoever confirms has seen it elsewhere.
        if matches!(self.stage, Stage::Idle) && presence != Presence::Incoming {
            return self.remembered().await;
        }
        let has_left = presence == Presence::Absent
            && matches!(&self.stage, Stage::Coming(record) if record.arrived || record.ran_here);
        if !matches!(presence, Presence::Present(_)) && !has_left {
            let message = format!("the guest is not on this node ({presence})");
            return Err(Fault::refused(message));
        }
        let record = self.coming(step.instance)?.clone();
        let lasting = |file: &&ComingFile| !file.present && file.role != FileRole::Delta;
        for file in record.files.iter().filter(lasting).filter(|_| !has_left) {
            hypervisor.flush_file(&file.path).await.map_err(fault)?;
        }
        let mut clean_up = CleanUp::default();
        if has_left {
            let made = record.files.iter().filter(|file| file.is_made());
            let made = made.map(|file| file.path.clone()).collect();
            clean_up.kept = self.left_of(made).await?;
        }
        let path = files::definition_path(&self.node.settings.state_dir, self.migration);
        definition::remove(&path).await?;
        self.forget_if_clean(step, Ended::Arrived, clean_up).await
    }

    /// Stops the guest and takes its definition away; its disks stay for now. On
    /// request only, and with evidence of what it goes back to: what it wrote here
    /// is lost unless its disks are shared.
    pub(in super::super) async fn revert_resize(
        &mut self,
        ask: RevertResize,
    ) -> Result<GuestLocation, Fault> {
        let mut record = self.coming(ask.instance)?.clone();
        let own = &self.node.settings.host;
        let hypervisor = self.node.hypervisor.clone();
        let presence = hypervisor.presence(ask.instance).await.map_err(fault)?;
        let proof = Reverting::to(ask.survivor.as_ref(), own, &record, presence)?;
        if record.reverted.is_none() {
            record.reverted = Some(presence.is_active());
            record.ran_here |= presence.is_active();
            // With what was changed about it here, should it not go back.
            let as_it_is = hypervisor.definition(ask.instance).await.map_err(fault)?;
            record.definition = as_it_is.or(record.definition);
            self.keep_coming(record).await?;
        }
        if presence.is_active() {
            let stopped = destroy::stop(&self.node, ask.instance, &proof).await;
            stopped.map_err(fault)?;
        }
        let withdrawn = destroy::withdraw(&self.node, ask.instance, &proof).await;
        withdrawn.map_err(fault)?;
        self.location(ask.instance).await
    }
}
