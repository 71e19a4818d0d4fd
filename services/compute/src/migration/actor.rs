//! The actor of one migration: takes its steps one after the other from a
//! mailbox, and lives as long as there is something to remember.

use std::{sync::Arc, time::Duration};

use drover_model::{
    api::{
        compute::{
            CheckDestination, CheckEvacuation, CheckPath, CheckSource, CheckTransfer, CleanUp,
            ColdPart, CopySeen, DestinationFacts, Ended as Over, EvacuationFacts, FinishResize,
            FinishRevertResize, GuestLocation, Inbox, JobState, Known, LiveMigration, PathFacts,
            PostLiveMigration, PreLiveMigration, PrepResize, PrepTransfer, RebuildInstance,
            RemoveCopy, ResizeInstance, RevertResize, SetAside, SourceFacts, StepRef,
            TransferFacts, TransferPart, TransferWork,
        },
        fault::Fault,
    },
    guest::Presence,
    ids::{InstanceId, MigrationId},
};
use tokio::{
    sync::{
        broadcast::{self, error::RecvError},
        mpsc, oneshot,
    },
    time::timeout,
};
use tracing::warn;

use super::{
    cold::Leaving,
    marks::Marks,
    orders::Order,
    past::Finished,
    registry::Registry,
    sending::{MonitorDied, Sending},
    transfer::Transferring,
};
use crate::{
    faults::{hypervisor, journal_lost},
    hypervisor::Event,
    journal::{
        ComingRecord, DestinationRecord, Ended, MarksRecord, RebuildRecord, Record, SourceRecord,
    },
    node::{Counters, Node},
};

/// How long a step waits for the conductor to tell what of this node lives
/// elsewhere by now.
const GATE_PATIENCE: Duration = Duration::from_secs(5);

/// Where a step's answer goes.
pub(crate) type Reply<T> = oneshot::Sender<Result<T, Fault>>;

/// A step, and where its answer goes.
pub(crate) enum Command {
    CheckSource(CheckSource, Reply<SourceFacts>),
    CheckDestination(Box<CheckDestination>, Reply<DestinationFacts>),
    CheckPath(CheckPath, Reply<PathFacts>),
    PreLiveMigration(Box<PreLiveMigration>, Reply<()>),
    LiveMigration(Box<LiveMigration>, Reply<JobState>),
    GetJob(StepRef, Reply<JobState>),
    Abort(StepRef, Reply<()>),
    ForceComplete(StepRef, Reply<()>),
    LookAtCopy(StepRef, Reply<CopySeen>),
    PostLiveMigration(Box<PostLiveMigration>, Reply<CleanUp>),
    PostAtDestination(StepRef, Reply<CleanUp>),
    RollbackAtDestination(Box<RemoveCopy>, Reply<CleanUp>),
    RollbackAtSource(StepRef, Reply<()>),
    PrepResize(Box<PrepResize>, Reply<Inbox>),
    ResizeInstance(Box<ResizeInstance>, Reply<JobState>),
    AbortResize(StepRef, Reply<()>),
    SetAside(Box<SetAside>, Reply<CleanUp>),
    FinishResize(FinishResize, Reply<GuestLocation>),
    RollbackResize(Box<RemoveCopy>, Reply<CleanUp>),
    FinishRevertResize(Box<FinishRevertResize>, Reply<GuestLocation>),
    ConfirmAtDestination(StepRef, Reply<CleanUp>),
    ConfirmResize(Box<RemoveCopy>, Reply<CleanUp>),
    RevertResize(Box<RevertResize>, Reply<GuestLocation>),
    CheckTransfer(CheckTransfer, Reply<TransferFacts>),
    PrepTransfer(Box<PrepTransfer>, Reply<()>),
    Transfer(TransferWork, Reply<JobState>),
    AbortTransfer(StepRef, Reply<()>),
    PostTransfer(StepRef, Reply<CleanUp>),
    RollbackTransfer(StepRef, Reply<CleanUp>),
    CheckEvacuation(Box<CheckEvacuation>, Reply<EvacuationFacts>),
    PrepRebuild(Box<RebuildInstance>, Reply<()>),
    Rebuild(StepRef, Reply<GuestLocation>),
    PostRebuild(StepRef, Reply<CleanUp>),
    RollbackRebuild(StepRef, Reply<CleanUp>),
    /// Another migration asks whether it could have the instance.
    MayStepAside(InstanceId, Reply<()>),
    /// Another migration takes the instance.
    StepAside(InstanceId, Reply<()>),
}

impl Command {
    /// Whether doing it may start a guest.
    fn may_start_a_guest(&self) -> bool {
        matches!(
            self,
            Self::LiveMigration(..)
                | Self::ResizeInstance(..)
                | Self::FinishResize(..)
                | Self::FinishRevertResize(..)
                | Self::Transfer(..)
                | Self::PrepRebuild(..)
                | Self::Rebuild(..)
        )
    }
}

/// A command in a mailbox.
pub(super) struct Asked {
    pub(super) command: Command,
    /// Of a conductor's step: its subject, its epoch, and where a refusal at the
    /// gate goes.
    pub(super) gate: Option<(StepRef, u64, oneshot::Sender<Fault>)>,
}

/// What this node is doing for a migration.
pub(super) enum Stage {
    /// Nothing that it would have to remember.
    Idle,
    /// The guest is on its way from here.
    Sending(Sending),
    /// It was on its way from here, and is not any more.
    Ended(Box<SourceRecord>),
    /// The guest is to come here.
    Arriving(DestinationRecord),
    /// The guest is leaving, shut off.
    Leaving(Box<Leaving>),
    /// The guest is coming, shut off.
    Coming(Box<ComingRecord>),
    /// The guest changes hands here.
    Transferring(Box<Transferring>),
    /// The guest of a dead node is defined here, and perhaps started.
    Rebuilding(Box<RebuildRecord>),
}

/// See the module.
pub(super) struct Actor {
    pub(super) node: Arc<Node>,
    pub(super) registry: Arc<Registry>,
    pub(super) migration: MigrationId,
    pub(super) stage: Stage,
    pub(super) marks: Option<Marks>,
    inbox: mpsc::Receiver<Asked>,
    events: broadcast::Receiver<Event>,
}

enum Happening {
    Step(Asked),
    Sent(Result<Box<SourceRecord>, MonitorDied>),
    Worked(ColdPart, Ended),
    Transferred(TransferPart, Ended),
    MarksAreDue,
    /// Something happened to a guest that is to come.
    Stirs,
}

impl Actor {
    pub(super) fn new(
        registry: &Arc<Registry>,
        migration: MigrationId,
        stage: Stage,
        inbox: mpsc::Receiver<Asked>,
    ) -> Self {
        let node = registry.node().clone();
        Self {
            events: node.hypervisor.events(),
            node,
            registry: registry.clone(),
            migration,
            stage,
            marks: None,
            inbox,
        }
    }

    /// An actor for what the journal says was under way.
    pub(super) fn resume(
        registry: &Arc<Registry>,
        migration: MigrationId,
        record: Record,
        marks: Option<MarksRecord>,
        inbox: mpsc::Receiver<Asked>,
    ) -> Self {
        let stage = match record {
            Record::Destination(record) => Stage::Arriving(record),
            Record::Leaving(record) => Stage::Leaving(Box::new(Leaving::resume(record))),
            Record::Coming(record) => Stage::Coming(record),
            Record::Rebuild(record) => Stage::Rebuilding(record),
            Record::Transfer(record) => Stage::Transferring(Box::new(Transferring::resume(record))),
            Record::Source(record) if record.ended.is_some() => Stage::Ended(record),
            Record::Source(record) => {
                Counters::add(&registry.node().counters.transfers_attached);
                Stage::Sending(Sending::watch(registry.node(), migration, *record, None))
            }
        };
        let mut actor = Self::new(registry, migration, stage, inbox);
        actor.marks = marks.map(Marks::due_now);
        actor
    }

    /// An actor for marks that a former life of the agent left.
    pub(super) fn sweep(
        registry: &Arc<Registry>,
        migration: MigrationId,
        marks: MarksRecord,
        inbox: mpsc::Receiver<Asked>,
    ) -> Self {
        let mut actor = Self::new(registry, migration, Stage::Idle, inbox);
        actor.marks = Some(Marks::due_now(marks));
        actor
    }

    pub(super) async fn run(mut self) {
        self.reopen().await;
        self.note_arrival().await;
        loop {
            let idle = matches!(self.stage, Stage::Idle) && self.marks.is_none();
            if idle && self.registry.retire(self.migration, &self.inbox) {
                return;
            }
            match self.next().await {
                Some(Happening::Step(asked)) => self.take(asked).await,
                Some(Happening::Sent(Ok(record))) => self.sent(record).await,
                Some(Happening::Sent(Err(MonitorDied))) => self.watch_again(),
                Some(Happening::Worked(part, ended)) => self.worked(part, ended).await,
                Some(Happening::Transferred(part, ended)) => self.transferred(part, ended).await,
                Some(Happening::MarksAreDue) => self.remove_marks().await,
                Some(Happening::Stirs) => self.note_arrival().await,
                None => return,
            }
        }
    }

    async fn next(&mut self) -> Option<Happening> {
        tokio::select! {
            biased;
            asked = self.inbox.recv() => asked.map(Happening::Step),
            happening = over(&mut self.stage, &mut self.events) => Some(happening),
            () = due(&self.marks) => Some(Happening::MarksAreDue),
        }
    }

    /// Does a step if its turn has not passed. Whoever asked for one that is not let
    /// in is told why; the others find that out in the order in which they came.
    async fn take(&mut self, asked: Asked) {
        let Asked { command, gate } = asked;
        let Some((step, epoch, refused)) = gate else {
            return self.serve(command).await;
        };
        // Whoever drives nothing may look at any time: that changes nothing.
        if epoch == 0 && matches!(command, Command::LookAtCopy(..)) {
            return self.serve(command).await;
        }
        if let Err(fault) = self.let_in(&command, step, epoch).await {
            // Whoever asked may have given up.
            drop(refused.send(fault));
            return;
        }
        self.serve(command).await;
        self.registry.past().leave(self.migration);
    }

    /// The gate that every step of a conductor passes.
    async fn let_in(&self, command: &Command, step: StepRef, epoch: u64) -> Result<(), Fault> {
        if command.may_start_a_guest() {
            self.has_asked().await?;
        }
        let now_ms = self.node.now_ms();
        self.registry.past().enter(step, epoch, now_ms).await
    }

    /// Refuses, for now, whatever may start a guest before the agent knows which of
    /// its guests live elsewhere (see [`crate::returning`]).
    async fn has_asked(&self) -> Result<(), Fault> {
        let mut asked = self.node.has_asked.subscribe();
        let passed = asked.wait_for(|asked| *asked);
        match timeout(GATE_PATIENCE, passed).await {
            Ok(_) => Ok(()),
            Err(_) => Err(Fault::not_now(
                "this node has not yet been told which of its guests were evacuated",
            )),
        }
    }

    async fn serve(&mut self, command: Command) {
        use Command as C;
        match command {
            C::CheckSource(step, to) => {
                let facts = self.check_source(step).await;
                self.answer(to, facts);
            }
            C::CheckDestination(step, to) => {
                let facts = self.check_destination(*step).await;
                self.answer(to, facts);
            }
            C::CheckPath(step, to) => {
                let facts = self.check_path(step).await;
                self.answer(to, facts);
            }
            C::PreLiveMigration(step, to) => {
                let done = self.pre_live_migration(*step).await;
                self.answer(to, done);
            }
            C::LiveMigration(step, to) => {
                let job = self.live_migration(*step).await;
                self.answer(to, job);
            }
            C::GetJob(step, to) => {
                let job = self.get_job(step).await;
                self.answer(to, job);
            }
            C::Abort(step, to) => self.order(step, Order::Abort, to).await,
            C::ForceComplete(step, to) => self.order(step, Order::ForceComplete, to).await,
            C::LookAtCopy(step, to) => {
                let seen = self.look_at_copy(step).await;
                self.answer(to, seen);
            }
            C::PostLiveMigration(step, to) => {
                let clean_up = self.post_live_migration(*step).await;
                self.answer(to, clean_up);
            }
            C::PostAtDestination(step, to) => {
                let clean_up = self.post_at_destination(step).await;
                self.answer(to, clean_up);
            }
            C::RollbackAtDestination(step, to) => {
                let clean_up = self.rollback_at_destination(*step).await;
                self.answer(to, clean_up);
            }
            C::RollbackAtSource(step, to) => {
                let done = self.rollback_at_source(step).await;
                self.answer(to, done);
            }
            C::PrepResize(step, to) => {
                let inbox = self.prep_resize(*step).await;
                self.answer(to, inbox);
            }
            C::ResizeInstance(step, to) => {
                let job = self.resize_instance(*step).await;
                self.answer(to, job);
            }
            C::AbortResize(step, to) => {
                let done = self.abort_resize(step).await;
                self.answer(to, done);
            }
            C::SetAside(step, to) => {
                let clean_up = self.set_aside(*step).await;
                self.answer(to, clean_up);
            }
            C::FinishResize(step, to) => {
                let location = self.finish_resize(step).await;
                self.answer(to, location);
            }
            C::RollbackResize(step, to) => {
                let clean_up = self.rollback_resize(*step).await;
                self.answer(to, clean_up);
            }
            C::FinishRevertResize(step, to) => {
                let location = self.finish_revert_resize(*step).await;
                self.answer(to, location);
            }
            C::ConfirmAtDestination(step, to) => {
                let clean_up = self.confirm_at_destination(step).await;
                self.answer(to, clean_up);
            }
            C::ConfirmResize(step, to) => {
                let clean_up = self.confirm_resize(*step).await;
                self.answer(to, clean_up);
            }
            C::RevertResize(step, to) => {
                let location = self.revert_resize(*step).await;
                self.answer(to, location);
            }
            C::MayStepAside(instance, to) => {
                let may = self.may_step_aside(instance).await;
                self.answer(to, may);
            }
            C::StepAside(instance, to) => {
                let done = self.step_aside(instance).await;
                self.answer(to, done);
            }
            other => self.serve_transfer(other).await,
        }
    }

    /// Steps of a transfer to another project.
    async fn serve_transfer(&mut self, command: Command) {
        use Command as C;
        match command {
            C::CheckTransfer(step, to) => {
                let facts = self.check_transfer(step).await;
                self.answer(to, facts);
            }
            C::PrepTransfer(step, to) => {
                let done = self.prep_transfer(*step).await;
                self.answer(to, done);
            }
            C::Transfer(step, to) => {
                let job = self.transfer_instance(step).await;
                self.answer(to, job);
            }
            C::AbortTransfer(step, to) => {
                let done = self.abort_transfer(step).await;
                self.answer(to, done);
            }
            C::PostTransfer(step, to) => {
                let clean_up = self.post_transfer(step).await;
                self.answer(to, clean_up);
            }
            C::RollbackTransfer(step, to) => {
                let clean_up = self.rollback_transfer(step).await;
                self.answer(to, clean_up);
            }
            other => self.serve_evacuation(other).await,
        }
    }

    /// Steps for guests of dead nodes.
    async fn serve_evacuation(&mut self, command: Command) {
        use Command as C;
        match command {
            C::CheckEvacuation(step, to) => {
                let facts = self.check_evacuation(*step).await;
                self.answer(to, facts);
            }
            C::PrepRebuild(step, to) => {
                let done = self.prep_rebuild(*step).await;
                self.answer(to, done);
            }
            C::Rebuild(step, to) => {
                let location = self.rebuild(step).await;
                self.answer(to, location);
            }
            C::PostRebuild(step, to) => {
                let clean_up = self.post_rebuild(step).await;
                self.answer(to, clean_up);
            }
            C::RollbackRebuild(step, to) => {
                let clean_up = self.rollback_rebuild(step).await;
                self.answer(to, clean_up);
            }
            // Every other command is served above.
            _ => {}
        }
    }

    fn answer<T>(&self, to: Reply<T>, answer: Result<T, Fault>) {
        // Whoever asked may have given up; the step is done all the same.
        drop(to.send(answer));
    }

    /// The migration with an instance.
    pub(super) fn step(&self, instance: InstanceId) -> StepRef {
        StepRef {
            migration: self.migration,
            instance,
        }
    }

    /// Writes down what this node does for the migration.
    ///
    /// # Errors
    /// The journal cannot be written; nothing is to be done then.
    pub(super) async fn write_down(&self, record: &Record) -> Result<(), Fault> {
        let migrations = &self.node.journal.migrations;
        migrations.store(self.migration, record).await?;
        let step = self.step(record.instance());
        let began = self.registry.past().began(step, self.node.now_ms()).await;
        if began.is_err() && matches!(self.stage, Stage::Idle) {
            // Nothing was done for it, so it may as well not be there.
            migrations.remove(self.migration).await?;
        }
        began
    }

    /// Makes sure that this migration may begin here.
    pub(super) async fn may_begin(&self, step: StepRef) -> Result<(), Fault> {
        self.registry
            .past()
            .may_begin(step, self.node.now_ms())
            .await
    }

    /// Nothing is left to do here: how it ended is written down first, then the
    /// rest is forgotten.
    ///
    /// # Errors
    /// The journal cannot be written; nothing is forgotten then.
    pub(super) async fn forget(&mut self, step: StepRef, finished: Finished) -> Result<(), Fault> {
        let now_ms = self.node.now_ms();
        self.registry.past().ended(step, finished, now_ms).await?;
        self.node.journal.migrations.remove(self.migration).await?;
        self.stage = Stage::Idle;
        self.registry.release(step);
        Ok(())
    }

    /// It is to be taken back, and nothing is here to take back: whatever of it is
    /// still on its way here comes too late. What it answered before, if it ended.
    ///
    /// # Errors
    /// Refused if the journal of it is lost while the guest is here: the copy may be
    /// this migration's own, or somebody's only one.
    pub(super) async fn never_begun(&mut self, step: StepRef) -> Result<CleanUp, Fault> {
        match self.registry.finished(self.migration).await? {
            Some(finished) if finished.how != Over::NeverBegun => return Ok(finished.clean_up),
            _ => {}
        }
        if self.registry.known(self.migration) == Known::Lost {
            let presence = self.node.hypervisor.presence(step.instance).await;
            if presence.map_err(hypervisor)? != Presence::Absent {
                return Err(journal_lost(self.migration));
            }
            warn!(migration = %self.migration, instance = %step.instance,
                "it is to be taken back, and what was made here for it is not known any more: \
                 look for disks of it that are left over");
            return Ok(CleanUp::default());
        }
        let finished = Finished::with(Over::NeverBegun);
        let past = self.registry.past();
        past.ended(step, finished, self.node.now_ms()).await?;
        Ok(CleanUp::default())
    }
}

/// The end of a transfer or of a part of the work, or news of a guest that is to
/// come; for ever silent where there is nothing to wait for.
async fn over(stage: &mut Stage, events: &mut broadcast::Receiver<Event>) -> Happening {
    match stage {
        Stage::Sending(sending) => Happening::Sent(sending.over().await),
        Stage::Leaving(leaving) => {
            let (part, ended) = leaving.parts.over().await;
            Happening::Worked(part, ended)
        }
        Stage::Transferring(transferring) => {
            let (part, ended) = transferring.parts.over().await;
            Happening::Transferred(part, ended)
        }
        stage => match super::look::awaited(stage) {
            Some(instance) => {
                stirs(events, instance).await;
                Happening::Stirs
            }
            None => std::future::pending().await,
        },
    }
}

/// Something may have happened to a guest.
async fn stirs(events: &mut broadcast::Receiver<Event>, instance: InstanceId) {
    loop {
        match events.recv().await {
            Ok(Event::Guest(id) | Event::JobCompleted(id)) if id == instance => return,
            Ok(Event::Connection { up: true }) | Err(RecvError::Lagged(_)) => return,
            Ok(_) => {}
            Err(RecvError::Closed) => std::future::pending().await,
        }
    }
}

async fn due(marks: &Option<Marks>) {
    match marks {
        Some(marks) => tokio::time::sleep_until(marks.due).await,
        None => std::future::pending().await,
    }
}
