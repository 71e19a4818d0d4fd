//! The actor of one migration: takes its steps one after the other from a
//! mailbox, and lives as long as there is something to remember.

use std::{sync::Arc, time::Duration};

use drover_model::{
    api::{
        compute::{CleanUp, ColdPart, Ended as Over, Known, StepRef, TransferPart},
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
    past::Finished,
    registry::Registry,
    sending::{MonitorDied, Sending},
    steps::{Kind, Work},
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

/// What waits in a mailbox.
pub(super) struct Asked {
    pub(super) work: Work,
    /// Of a conductor's step.
    pub(super) gate: Option<Gate>,
}

/// What a step of a conductor has to pass.
pub(super) struct Gate {
    pub(super) step: StepRef,
    pub(super) epoch: u64,
    pub(super) kind: Kind,
    /// Where a refusal goes.
    pub(super) refused: oneshot::Sender<Fault>,
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
        let Asked { work, gate } = asked;
        let Some(gate) = gate else {
            return work(self).await;
        };
        // Whoever drives nothing may look at any time: that changes nothing.
        if gate.epoch == 0 && gate.kind == Kind::Looks {
            return work(self).await;
        }
        if let Err(fault) = self.let_in(&gate).await {
            // Whoever asked may have given up.
            drop(gate.refused.send(fault));
            return;
        }
        work(self).await;
        self.registry.past().leave(self.migration);
    }

    /// The gate that every step of a conductor passes.
    async fn let_in(&self, gate: &Gate) -> Result<(), Fault> {
        if gate.kind == Kind::MayStart {
            self.has_asked().await?;
        }
        let now_ms = self.node.now_ms();
        let past = self.registry.past();
        past.enter(gate.step, gate.epoch, now_ms).await
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
