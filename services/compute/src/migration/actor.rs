//! The actor of one migration: takes its steps one after the other from a
//! mailbox, and lives as long as there is something to remember.

use std::sync::Arc;

use drover_model::{
    api::{
        compute::{
            CheckDestination, CheckEvacuation, CheckPath, CheckSource, CheckTransfer, CleanUp,
            ColdPart, CopySeen, DestinationFacts, EvacuationFacts, FinishResize,
            FinishRevertResize, GuestLocation, Inbox, JobState, LiveMigration, PathFacts,
            PostLiveMigration, PreLiveMigration, PrepResize, PrepTransfer, RebuildInstance,
            RemoveCopy, ResizeInstance, RevertResize, SourceFacts, StepRef, TransferFacts,
            TransferPart, TransferWork,
        },
        fault::Fault,
    },
    ids::{InstanceId, MigrationId},
};
use tokio::sync::{
    broadcast::{self, error::RecvError},
    mpsc, oneshot,
};

use super::{
    cold::Leaving,
    marks::Marks,
    orders::Order,
    registry::{Finished, Registry},
    sending::{MonitorDied, Sending},
    transfer::Transferring,
};
use crate::{
    hypervisor::Event,
    journal::{
        ComingRecord, DestinationRecord, Ended, MarksRecord, RebuildRecord, Record, SourceRecord,
    },
    node::{Counters, Node},
};

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
    SetAside(StepRef, Reply<CleanUp>),
    FinishResize(FinishResize, Reply<GuestLocation>),
    RollbackResize(Box<RemoveCopy>, Reply<CleanUp>),
    FinishRevertResize(FinishRevertResize, Reply<GuestLocation>),
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
    /// Another migration wants the instance.
    StepAside(InstanceId, Reply<()>),
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
    inbox: mpsc::Receiver<Command>,
    events: broadcast::Receiver<Event>,
}

enum Happening {
    Step(Command),
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
        inbox: mpsc::Receiver<Command>,
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
        inbox: mpsc::Receiver<Command>,
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
        inbox: mpsc::Receiver<Command>,
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
                Some(Happening::Step(command)) => self.serve(command).await,
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
            command = self.inbox.recv() => command.map(Happening::Step),
            happening = over(&mut self.stage, &mut self.events) => Some(happening),
            () = due(&self.marks) => Some(Happening::MarksAreDue),
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
            C::GetJob(step, to) => self.answer(to, self.get_job(step)),
            C::Abort(step, to) => self.order(step, Order::Abort, to),
            C::ForceComplete(step, to) => self.order(step, Order::ForceComplete, to),
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
                let clean_up = self.set_aside(step).await;
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
                let location = self.finish_revert_resize(step).await;
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

    /// Nothing is left to do here: forgets the journal first, then the rest.
    ///
    /// # Errors
    /// The journal's file cannot be removed; nothing is forgotten then.
    pub(super) async fn forget(&mut self, step: StepRef, finished: Finished) -> Result<(), Fault> {
        self.node.journal.migrations.remove(self.migration).await?;
        self.stage = Stage::Idle;
        self.registry.release(step, Some(finished));
        Ok(())
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
        Stage::Arriving(record) if !record.ran_here => {
            stirs(events, record.instance).await;
            Happening::Stirs
        }
        _ => std::future::pending().await,
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
