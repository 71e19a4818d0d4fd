//! The steps that a conductor asks of a migration's actor: one row a step, with what serves it.

use std::{future::Future, pin::Pin, sync::Arc};

use drover_model::api::{
    compute::{self, Call, Subject},
    fault::Fault,
};
use drover_rpc::{RemoteFailure, Request};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tokio::sync::oneshot;

use super::{actor::Actor, registry::Registry};
use crate::faults;

/// Where a step's answer goes.
pub(super) type Reply<T> = oneshot::Sender<Result<T, Fault>>;

/// What an actor does.
pub(super) type Doing<'a, T = ()> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// The same, before it does it.
pub(super) type Work = Box<dyn for<'a> FnOnce(&'a mut Actor) -> Doing<'a> + Send>;

/// What a step is to the gate that it has to pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// It may do anything but start a guest.
    Acts,
    /// It may start a guest.
    MayStart,
    /// It changes nothing.
    Looks,
}

/// A step that is served.
pub(crate) struct Step {
    /// Its method.
    pub(crate) method: &'static str,
    serve: Serve,
}

type Serve = for<'a> fn(&'a Arc<Registry>, &'a Request) -> Doing<'a, Answer>;
type Answer = Result<Value, RemoteFailure>;

/// The one that a method asks for.
pub(crate) fn step(method: &str) -> Option<&'static Step> {
    STEPS.iter().find(|step| step.method == method)
}

impl Step {
    /// Has its migration's actor do it: the one way from a conductor to what an agent
    /// does. It is in the mailbox before anything is waited for.
    pub(crate) async fn serve(&self, registry: &Arc<Registry>, request: &Request) -> Answer {
        (self.serve)(registry, request).await
    }
}

/// The epoch of the lease under which a conductor asks; none of an older one.
#[derive(Deserialize)]
pub(crate) struct Under {
    #[serde(default)]
    pub(crate) epoch: u64,
}

async fn ask<C, S>(
    registry: &Arc<Registry>,
    request: &Request,
    kind: Kind,
    run: impl for<'a> FnOnce(&'a mut Actor, S, Reply<C::Answer>) -> Doing<'a> + Send + 'static,
) -> Answer
where
    C: Call<Answer: Serialize + Send + 'static>,
    S: Subject + Send + 'static,
{
    let Under { epoch } = request.args()?;
    let step: S = request.args()?;
    let subject = step.subject();
    let work = |to| -> Work { Box::new(move |actor| run(actor, step, to)) };
    let answer = registry.ask(subject, epoch, kind, work).await;
    faults::answer(answer)
}

/// `Call => what of the actor serves it, what it is to the gate`; what `answers_later`
/// is given the place for its answer.
macro_rules! steps {
    ($($call:ident => $handler:ident $(, $kind:ident)?;)+) => {
        pub(crate) const STEPS: &[Step] = &[$(Step {
            method: compute::$call::METHOD,
            serve: |registry, request| {
                let kind = kind!($($kind)?);
                Box::pin(ask::<compute::$call, _>(registry, request, kind, |actor, step, to| {
                    Box::pin(async move { serve!(actor.$handler(step, to) $(, $kind)?) })
                }))
            },
        }),+];
    };
}

macro_rules! kind {
    (may_start) => {
        Kind::MayStart
    };
    (looks) => {
        Kind::Looks
    };
    ($(answers_later)?) => {
        Kind::Acts
    };
}

macro_rules! serve {
    ($actor:ident.$handler:ident($step:ident, $to:ident), answers_later) => {
        $actor.$handler($step, $to).await
    };
    ($actor:ident.$handler:ident($step:ident, $to:ident) $(, $kind:ident)?) => {{
        let answer = $actor.$handler($step).await;
        // Whoever asked may have given up; the step is done all the same.
        drop($to.send(answer));
    }};
}

steps! {
    // Live.
    CheckSource => check_source;
    CheckDestination => check_destination;
    CheckPath => check_path;
    PreLiveMigration => pre_live_migration;
    LiveMigration => live_migration, may_start;
    GetJob => get_job;
    Abort => abort, answers_later;
    ForceComplete => force_complete, answers_later;
    LookAtCopy => look_at_copy, looks;
    PostLiveMigration => post_live_migration;
    PostAtDestination => post_at_destination;
    RollbackAtDestination => rollback_at_destination;
    RollbackAtSource => rollback_at_source;
    // Cold.
    PrepResize => prep_resize;
    ResizeInstance => resize_instance, may_start;
    AbortResize => abort_resize;
    SetAside => set_aside;
    FinishResize => finish_resize, may_start;
    RollbackResize => rollback_resize;
    FinishRevertResize => finish_revert_resize, may_start;
    ConfirmAtDestination => confirm_at_destination;
    ConfirmResize => confirm_resize;
    RevertResize => revert_resize;
    // To another project.
    CheckTransfer => check_transfer;
    PrepTransfer => prep_transfer;
    TransferWork => transfer_instance, may_start;
    AbortTransfer => abort_transfer;
    PostTransfer => post_transfer;
    RollbackTransfer => rollback_transfer;
    // Of dead nodes.
    CheckEvacuation => check_evacuation;
    RebuildInstance => prep_rebuild, may_start;
    Rebuild => rebuild, may_start;
    PostRebuild => post_rebuild;
    RollbackRebuild => rollback_rebuild;
}
