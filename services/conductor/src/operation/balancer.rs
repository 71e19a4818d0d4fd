//! Balancing without being asked: looks at the load now and then, and begins a
//! balance of its own, or (in shadow) only tells what it would do.

use drover_model::{
    check,
    migration::Requester,
    operation::{BalanceOptions, OperationPlan, Task, Verdict},
};
use drover_rpc::{Notifier, Priority, RequestContext};
use drover_store::StoreError;
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::{begin::Answer, look, runner::OperationRunner};
use crate::{clock::goes_on_after, config::BalanceMode, plan::Examinations};

/// Switches it off for a while, and on again.
pub const SWITCH: &str = "balance";

/// Looks until told to stop; not at all if the settings say so.
pub async fn keep(runner: OperationRunner, notifier: Notifier, stop: CancellationToken) {
    let settings = runner.context.balance;
    if settings.mode == BalanceMode::Off {
        return;
    }
    while goes_on_after(settings.interval, &stop).await {
        match look_once(&runner, settings.mode).await {
            Ok(Some(plan)) => tell(&notifier, &plan).await,
            Ok(None) => {}
            Err(error) => warn!(%error, "the load could not be looked at; tried again soon"),
        }
    }
}

/// Begins a balance if one is due; in shadow, gives what it would do.
async fn look_once(
    runner: &OperationRunner,
    mode: BalanceMode,
) -> Result<Option<OperationPlan>, StoreError> {
    let store = &runner.context.store;
    let under_way = store.active_operation(None).await?.is_some();
    if under_way || !store.is_switched_on(SWITCH).await? {
        return Ok(None);
    }
    let task = Task::Balance(BalanceOptions {
        automatic: true,
        ..BalanceOptions::default()
    });
    let planned = look::plan(&runner.context, &task, None, Examinations::new()).await?;
    if planned.plan.moving().next().is_none() {
        return Ok(None);
    }
    if mode == BalanceMode::Shadow {
        return Ok(Some(planned.plan));
    }
    let begun = runner.begin(task, Requester::default(), None).await?;
    if let Answer::Refused(failures) = begun {
        let failures = check::texts(&failures);
        warn!(failures, "load is not balanced now");
    }
    Ok(None)
}

async fn tell(notifier: &Notifier, plan: &OperationPlan) {
    let payload = shadow(plan);
    info!(%payload, "in shadow: load would be balanced so");
    let context = RequestContext::service(String::new());
    let sent = notifier
        .notify(&context, Priority::Info, "node.balance.shadow", &payload)
        .await;
    if let Err(error) = sent {
        warn!(%error, "a notification was not sent");
    }
}

fn shadow(plan: &OperationPlan) -> Value {
    let moves = plan.moves.iter().filter_map(|m| match &m.verdict {
        Verdict::Moves { to, way, .. } => Some(json!({
            "instance_uuid": m.instance,
            "instance_name": m.name,
            "source_host": m.source,
            "dest_host": to,
            "way": way,
            "spread_after_percent": m.spread_after_percent,
        })),
        Verdict::Stays { .. } => None,
    });
    json!({
        "moves": moves.collect::<Vec<_>>(),
        "spread_percent": plan.spread_percent,
    })
}
