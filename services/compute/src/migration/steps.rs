//! The steps that a conductor asks of a migration's actor: one row a step, with what serves it.

use std::{future::Future, pin::Pin, sync::Arc};

use drover_model::api::{
    compute::{Subject, method},
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

async fn ask<S, T>(
    registry: &Arc<Registry>,
    request: &Request,
    kind: Kind,
    run: impl for<'a> FnOnce(&'a mut Actor, S, Reply<T>) -> Doing<'a> + Send + 'static,
) -> Answer
where
    S: Subject + Send + 'static,
    T: Serialize + Send + 'static,
{
    let Under { epoch } = request.args()?;
    let step: S = request.args()?;
    let subject = step.subject();
    let work = |to| -> Work { Box::new(move |actor| run(actor, step, to)) };
    let answer = registry.ask(subject, epoch, kind, work).await;
    faults::answer(answer)
}

/// `METHOD => what of the actor serves it, what it is to the gate`; what `answers_later`
/// is given the place for its answer.
macro_rules! steps {
    ($($method:ident => $handler:ident $(, $kind:ident)?;)+) => {
        pub(crate) const STEPS: &[Step] = &[$(Step {
            method: method::$method,
            serve: |registry, request| {
                Box::pin(ask(registry, request, kind!($($kind)?), |actor, step, to| {
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
    CHECK_SOURCE => check_source;
    CHECK_DESTINATION => check_destination;
    CHECK_PATH => check_path;
    PRE_LIVE_MIGRATION => pre_live_migration;
    LIVE_MIGRATION => live_migration, may_start;
    GET_JOB => get_job;
    ABORT => abort, answers_later;
    FORCE_COMPLETE => force_complete, answers_later;
    LOOK_AT_COPY => look_at_copy, looks;
    POST_LIVE_MIGRATION => post_live_migration;
    POST_AT_DESTINATION => post_at_destination;
    ROLLBACK_AT_DESTINATION => rollback_at_destination;
    ROLLBACK_AT_SOURCE => rollback_at_source;
    // Cold.
    PREP_RESIZE => prep_resize;
    RESIZE_INSTANCE => resize_instance, may_start;
    ABORT_RESIZE => abort_resize;
    SET_ASIDE => set_aside;
    FINISH_RESIZE => finish_resize, may_start;
    ROLLBACK_RESIZE => rollback_resize;
    FINISH_REVERT_RESIZE => finish_revert_resize, may_start;
    CONFIRM_AT_DESTINATION => confirm_at_destination;
    CONFIRM_RESIZE => confirm_resize;
    REVERT_RESIZE => revert_resize;
    // To another project.
    CHECK_TRANSFER => check_transfer;
    PREP_TRANSFER => prep_transfer;
    TRANSFER_INSTANCE => transfer_instance, may_start;
    ABORT_TRANSFER => abort_transfer;
    POST_TRANSFER => post_transfer;
    ROLLBACK_TRANSFER => rollback_transfer;
    // Of dead nodes.
    CHECK_EVACUATION => check_evacuation;
    PREP_REBUILD => prep_rebuild, may_start;
    REBUILD => rebuild, may_start;
    POST_REBUILD => post_rebuild;
    ROLLBACK_REBUILD => rollback_rebuild;
}
