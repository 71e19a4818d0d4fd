//! Drives one operation: has it planned, and carries out what
//! [`crate::plan::schedule`] says may begin, whenever anything changes.

use std::time::Duration;

use async_trait::async_trait;
use drover_model::{
    check::{self, CheckFailure},
    ids::{HostName, InstanceId, MigrationId, OperationId},
    operation::{EvacuateOptions, Evidence, MoveWay, Operation, OperationStatus, Task},
};
use drover_store::{
    Store, StoreError, Term,
    fencing::{FenceClaim, FenceRefusal},
    operations::OperationLease,
};
use futures_util::{StreamExt, stream};
use tokio::{
    sync::broadcast,
    time::{Instant, sleep, sleep_until, timeout},
};
use tracing::{error, info, warn};

use super::{
    evacuation::{self, LastWord},
    evidence::not_claimed,
    look, record, ways,
};
use crate::{
    admission::{Admission, Answer, Wanted},
    app::Context,
    plan::{
        Examinations,
        schedule::{self, Act, Note},
    },
    task::runner::Runner,
};

/// How long nothing may change before the world is looked at all the same.
const LOOK: Duration = Duration::from_secs(3);
/// Least rest after a look: many guests on their way change the record all the time.
const CALM: Duration = Duration::from_millis(50);
/// A look that takes long is followed by this part of its length, at least.
const REST_PER_LOOK: u32 = 4;
/// Guests admitted at once.
const ADMITTED_AT_ONCE: usize = 8;

/// One operation at work.
pub(super) struct Drive {
    context: Context,
    moves: Runner,
    lease: OperationLease,
    /// What the nodes said when the plan was made. A conductor that took the
    /// operation up has not heard it, and finds out by trying.
    examinations: Examinations,
}

type Result<T> = drover_store::Result<T>;

impl Drive {
    pub(super) fn new(context: Context, moves: Runner, lease: OperationLease) -> Self {
        Self {
            context,
            moves,
            lease,
            examinations: Examinations::new(),
        }
    }

    fn store(&self) -> &Store {
        &self.context.store
    }

    /// Until it is at its end.
    pub(super) async fn run(&mut self) -> Result<()> {
        loop {
            let began = Instant::now();
            let mut watch = Watch::new(self.store(), self.lease.operation);
            let operation = self.store().operation(self.lease.operation).await?;
            let planning = operation.status == OperationStatus::Planning;
            let acted = match (operation.status, operation.cancel_requested) {
                (status, _) if status.is_final() => return Ok(()),
                (OperationStatus::Planning | OperationStatus::Running, true) => {
                    self.call_off().await?;
                    true
                }
                (OperationStatus::Planning, false) => {
                    self.plan(&operation).await?;
                    true
                }
                _ => self.step(&operation).await?,
            };
            let took = began.elapsed();
            if !acted {
                watch.changed().await;
            }
            if !planning {
                sleep_until(began + took + CALM.max(took / REST_PER_LOOK)).await;
            }
        }
    }

    async fn write(
        &self,
        mut change: impl FnMut(&mut Operation, u64) -> bool + Send,
    ) -> Result<()> {
        let now_ms = self.context.clock.now_ms();
        let change = |o: &mut Operation| change(o, now_ms);
        let lease = Some(self.lease);
        let written = self
            .store()
            .update_operation(self.lease.operation, lease, change);
        written.await.map(|_| ())
    }

    async fn call_off(&self) -> Result<()> {
        self.write(|o, now_ms| {
            o.status = OperationStatus::Cancelling;
            record::decide(
                o,
                now_ms,
                "called off: nothing more begins, what moves is called back",
            );
            true
        })
        .await
    }

    // ---- planning

    async fn plan(&mut self, operation: &Operation) -> Result<()> {
        let mut examinations = Examinations::new();
        match &operation.task {
            Task::Drain(o) => self.close(&o.host, o.reason.as_deref()).await?,
            Task::Restore(o) => self.open(&o.host).await?,
            Task::Evacuate(o) => {
                // Other nodes are asked while the fence does its work: guests are off
                // for less time.
                let asking = evacuation::examine(&self.context, o);
                let (is_dead, asked) = tokio::join!(self.prove(operation, o), asking);
                if !is_dead? {
                    return Ok(());
                }
                examinations = asked?;
            }
            Task::Balance(_) => {}
        }
        let own = Some(operation.uuid);
        let planned = look::plan(&self.context, &operation.task, own, examinations).await?;
        let now_ms = self.context.clock.now_ms();
        let change = |o: &mut Operation| {
            if o.status != OperationStatus::Planning || o.cancel_requested {
                return None;
            }
            record::take_plan(o, &planned.plan, now_ms);
            Some(vec![record::told(o, "start")])
        };
        let lease = Some(self.lease);
        let running = self
            .store()
            .tell_operation(operation.uuid, lease, change)
            .await?;
        info!(
            operation = running.id,
            moves = planned.plan.moving().count(),
            "planned"
        );
        self.examinations = planned.examinations;
        Ok(())
    }

    /// Nothing new is placed on a node that is drained. A reason that an operator
    /// gave before stays, unless there is another.
    async fn close(&self, host: &HostName, reason: Option<&str>) -> Result<()> {
        let node = self.store().node(host).await?;
        if !node.enabled && reason.is_none() {
            return Ok(());
        }
        let reason = match reason {
            Some(reason) => format!("drained: {reason}"),
            None => "drained".to_owned(),
        };
        if !node.enabled && node.disabled_reason.as_ref() == Some(&reason) {
            return Ok(());
        }
        self.store().set_node(host, false, Some(&reason)).await?;
        let text = format!("closed {host} for new instances ({reason})");
        self.decide(text).await
    }

    async fn open(&self, host: &HostName) -> Result<()> {
        if self.store().node(host).await?.enabled {
            return Ok(());
        }
        self.store().set_node(host, true, None).await?;
        self.decide(format!("opened {host} for instances")).await
    }

    async fn decide(&self, text: String) -> Result<()> {
        self.write(|o, now_ms| {
            record::decide(o, now_ms, text.clone());
            true
        })
        .await
    }

    /// Whether the node is proven dead; if not, that is the operation's end.
    async fn prove(&self, operation: &Operation, options: &EvacuateOptions) -> Result<bool> {
        if operation.proof.is_some() {
            return Ok(true);
        }
        if options.automatic && !self.has_listened() {
            // A conductor that just took this up has no evidence of its own yet.
            sleep(LOOK).await;
            return Ok(false);
        }
        let last_word = Claim {
            drive: self,
            options,
        };
        let by = &operation.requester;
        let proven = evacuation::prove(&self.context, options, by, &last_word).await;
        let (evidence, proof) = proven?;
        if evidence.cut_at_ms.is_some() {
            self.store().fence_ended(operation.uuid).await?;
        }
        match proof {
            Ok(proof) => {
                self.write(|o, now_ms| {
                    o.evidence = Some(evidence.clone());
                    o.proof = Some(proof.clone());
                    record::decide(
                        o,
                        now_ms,
                        format!("{} is off: its guests may start elsewhere", options.host),
                    );
                    true
                })
                .await?;
                Ok(true)
            }
            Err(refusals) => {
                self.write(|o, _| {
                    o.evidence = Some(evidence.clone());
                    true
                })
                .await?;
                self.fail(refusals).await?;
                Ok(false)
            }
        }
    }

    fn has_listened(&self) -> bool {
        self.context.store.hearing().listened_ms() > self.context.down_after_ms
    }

    /// Keeps the evidence on which a node's power is about to be cut, and says
    /// what forbids it.
    async fn before_cut(
        &self,
        options: &EvacuateOptions,
        evidence: &Evidence,
    ) -> Result<Vec<CheckFailure>> {
        let context = &self.context;
        let host = &options.host;
        let longest_ms = u64::try_from(context.fences.longest().as_millis()).unwrap_or(u64::MAX);
        let claim = FenceClaim {
            host,
            lease: self.lease,
            conductor: &context.name,
            term: Term {
                now_ms: context.clock.now_ms(),
                lease_ms: longest_ms,
            },
            life: evidence.life,
            heard_at_ms: evidence.heard_at_ms,
            limits: options.automatic.then_some(context.auto_evacuate.limits),
        };
        match self.store().claim_fence(&claim).await? {
            Ok(()) => {}
            Err(FenceRefusal::UnderWay { conductor, .. }) => {
                let what = format!("the power of {host}, which {conductor} may be cutting,");
                return Err(StoreError::Conflict(what));
            }
            Err(refusal) => {
                let failure = not_claimed(host, &refusal);
                error!(%host, reason = %failure, "its power is not cut");
                return Ok(vec![failure]);
            }
        }
        let text = match evidence.fence.is_off() {
            true => format!("{host} is off by its fencing agent's status; it is told off to see"),
            false => format!("the power of {host} is cut"),
        };
        self.write(|o, now_ms| {
            o.evidence = Some(Evidence {
                cut_at_ms: Some(now_ms),
                ..evidence.clone()
            });
            record::decide(o, now_ms, text.clone());
            true
        })
        .await?;
        Ok(Vec::new())
    }

    async fn fail(&self, refusals: Vec<CheckFailure>) -> Result<()> {
        let now_ms = self.context.clock.now_ms();
        let change = |o: &mut Operation| {
            o.failure = Some(check::texts(&refusals));
            o.refusals.clone_from(&refusals);
            record::end(o, OperationStatus::Failed, now_ms);
            Some(vec![record::told_at_end(o)])
        };
        let lease = Some(self.lease);
        self.store()
            .tell_operation(self.lease.operation, lease, change)
            .await?;
        Ok(())
    }

    // ---- running

    /// Does what may be done now; says whether there was anything.
    async fn step(&self, operation: &Operation) -> Result<bool> {
        let own = self.store().migrations_of(operation.uuid).await?;
        let eyes = look::Eyes {
            own: Some(operation.uuid),
            ..look::Eyes::default()
        };
        let view = look::view(&self.context, eyes).await?;
        let costs = (self.context.limits, self.context.costs);
        let acts = schedule::next(
            operation,
            &view.world,
            &own,
            &view.active,
            &self.examinations,
            costs,
        );
        if acts.is_empty() {
            return Ok(false);
        }
        self.carry_out(operation, acts).await
    }

    async fn carry_out(&self, operation: &Operation, acts: Vec<Act>) -> Result<bool> {
        let (mut notes, mut starts, mut aborts, mut end) = (vec![], vec![], vec![], None);
        for act in acts {
            match act {
                Act::Start {
                    instance,
                    way,
                    to,
                    attempt,
                } => starts.push((instance, way, to, attempt)),
                Act::Note(note) => notes.push(note),
                Act::Abort(migration) => aborts.push(migration),
                Act::End(status) => end = Some(status),
            }
        }
        let mut acted = self.note(&notes).await? || !starts.is_empty();
        let started: Vec<Result<Option<Note>>> = stream::iter(starts)
            .map(|start| self.start(operation, start))
            .buffer_unordered(ADMITTED_AT_ONCE)
            .collect()
            .await;
        let started = started
            .into_iter()
            .filter_map(Result::transpose)
            .collect::<Result<Vec<_>>>()?;
        acted |= self.note(&started).await?;
        for migration in aborts {
            self.abort(migration).await?;
        }
        if let Some(status) = end {
            self.end(status).await?;
            acted = true;
        }
        Ok(acted)
    }

    /// Writes down where guests stand; says whether that is news.
    async fn note(&self, notes: &[Note]) -> Result<bool> {
        let mut changed = false;
        if !notes.is_empty() {
            self.write(|o, now_ms| {
                changed = record::take_notes(o, notes, now_ms);
                changed
            })
            .await?;
        }
        Ok(changed)
    }

    /// Has a guest moved. A refusal has a record of its own, and is found there
    /// by the next look, as every other end of a migration is.
    async fn start(
        &self,
        operation: &Operation,
        (instance, way, to, attempt): (InstanceId, MoveWay, HostName, usize),
    ) -> Result<Option<Note>> {
        let Some(way) = ways::migration(operation, way) else {
            warn!(operation = operation.id, %instance, "nothing proves that its node is dead");
            return Ok(None);
        };
        let row = match self.store().find_instance(&instance.to_string()).await {
            Ok(row) => row,
            Err(StoreError::NotFound(_)) => return Ok(Some(Note::gone(instance))),
            Err(error) => return Err(error),
        };
        let wanted = Wanted {
            instance: row,
            host: Some(to),
            way,
            consent: None,
            operation: Some(operation.uuid),
        };
        let admission = Admission {
            context: &self.context,
            runner: &self.moves,
        };
        let name = format!("op-{}-{instance}-{attempt}", operation.uuid);
        let by = operation.requester.clone();
        match admission.admit(by, Some(&name), &wanted).await {
            Ok(Answer::Accepted(m)) => Ok(Some(Note::moving(&m))),
            Ok(Answer::Refused { .. } | Answer::OfferTaken(_)) => Ok(None),
            // It is elsewhere by now, or gone: the next look sees where.
            Err(StoreError::Conflict(_) | StoreError::NotFound(_)) => Ok(None),
            Err(error) => Err(error),
        }
    }

    async fn abort(&self, migration: MigrationId) -> Result<()> {
        match self.moves.abort(migration).await {
            Ok(_) => Ok(()),
            // It is over: the next look sees how.
            Err(StoreError::NotFound(_)) => Ok(()),
            Err(error) => Err(error),
        }
    }

    async fn end(&self, status: OperationStatus) -> Result<()> {
        let now_ms = self.context.clock.now_ms();
        let change = |o: &mut Operation| {
            record::end(o, status, now_ms);
            Some(vec![record::told_at_end(o)])
        };
        let lease = Some(self.lease);
        let ended = self
            .store()
            .tell_operation(self.lease.operation, lease, change)
            .await?;
        info!(operation = ended.id, %status, moved = ended.count("moved"), "ended");
        Ok(())
    }
}

/// The right to cut a node's power is claimed in the record first.
struct Claim<'a> {
    drive: &'a Drive,
    options: &'a EvacuateOptions,
}

#[async_trait]
impl LastWord for Claim<'_> {
    async fn before_cut(&self, evidence: &Evidence) -> Result<Vec<CheckFailure>> {
        self.drive.before_cut(self.options, evidence).await
    }
}

/// What wakes an operation: its own record, and migrations of any, which free
/// places.
struct Watch {
    own: OperationId,
    operations: broadcast::Receiver<OperationId>,
    migrations: broadcast::Receiver<MigrationId>,
}

impl Watch {
    fn new(store: &Store, own: OperationId) -> Self {
        Self {
            own,
            operations: store.operation_changes(),
            migrations: store.changes(),
        }
    }

    /// Resolves when anything may have changed, or after a while.
    async fn changed(&mut self) {
        let own = self.own;
        let operation = async {
            // Lagging behind is as good as a change.
            while matches!(self.operations.recv().await, Ok(other) if other != own) {}
        };
        let any = async {
            tokio::select! {
                biased;
                () = operation => {}
                _ = self.migrations.recv() => {}
            }
        };
        let _ = timeout(LOOK, any).await;
    }
}
