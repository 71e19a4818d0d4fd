//! Operations on nodes: `drain_node`, `restore_node`, `evacuate_node`,
//! `balance_nodes`, and what is asked about them.

use std::collections::HashMap;

use drover_model::{
    api::conductor::{
        Automation, BalanceNodes, DrainNode, EvacuateNode, EvidenceAnswer, OperationAnswer,
        OperationRef, OperationView, RestoreNode, SetAutomation, WaitOperation, method,
    },
    ids::{MigrationId, OperationId},
    migration::Migration,
    operation::{EvacuateOptions, Operation, Task},
};
use drover_rpc::{RemoteFailure, Request};
use tokio::{
    sync::broadcast,
    time::{Duration, Instant, timeout_at},
};
use tracing::info;

use super::{
    Answer, DroverEndpoint,
    failure::{self, store_failure, to_value},
    migrate::requester,
    wait::{LONGEST, LOOK, SHORT},
};
use crate::{
    config::BalanceMode,
    operation::{auto_evacuate, balancer, begin, evacuation},
};

impl DroverEndpoint {
    pub(super) async fn handle_operations(&self, request: &Request) -> Answer {
        match request.method() {
            method::DRAIN_NODE => {
                let DrainNode { options, dry_run } = request.args()?;
                self.operate(request, Task::Drain(options), dry_run).await
            }
            method::RESTORE_NODE => {
                let RestoreNode { options, dry_run } = request.args()?;
                self.operate(request, Task::Restore(options), dry_run).await
            }
            method::EVACUATE_NODE => {
                let EvacuateNode {
                    mut options,
                    dry_run,
                } = request.args()?;
                options.automatic = false;
                self.operate(request, Task::Evacuate(options), dry_run)
                    .await
            }
            method::GET_EVIDENCE => {
                let EvacuateNode { options, .. } = request.args()?;
                // Many nodes are asked: no unacknowledged message is held meanwhile.
                request.accept().await;
                to_value(&self.evidence(request, options).await?)
            }
            method::BALANCE_NODES => {
                let BalanceNodes {
                    mut options,
                    dry_run,
                } = request.args()?;
                options.automatic = false;
                self.operate(request, Task::Balance(options), dry_run).await
            }
            method::GET_OPERATION => {
                let operation = self.operation(&request.args()?).await?;
                to_value(&self.operation_view(operation).await?)
            }
            method::WAIT_OPERATION => {
                let ask: WaitOperation = request.args()?;
                // A long wait holds no unacknowledged message.
                request.accept().await;
                to_value(&self.wait_operation(&ask).await?)
            }
            method::LIST_OPERATIONS => {
                let ask = request.args()?;
                let listed = self.context.store.operations_as_kept(&ask).await;
                to_value(&listed.map_err(|e| store_failure(&e))?)
            }
            method::CANCEL_OPERATION => {
                let operation = self.cancel_operation(&request.args()?).await?;
                to_value(&self.operation_view(operation).await?)
            }
            method::SET_AUTOMATION => to_value(&self.set_automation(&request.args()?).await?),
            _ => self.handle_projects(request).await,
        }
    }

    async fn operate(&self, request: &Request, task: Task, dry_run: bool) -> Answer {
        if dry_run {
            // Many nodes are asked: no unacknowledged message is held meanwhile.
            request.accept().await;
            let by = requester(request.context());
            let planned = self.operations.dry_run(&task, &by).await;
            let (planned, failures) = planned.map_err(|e| store_failure(&e))?;
            return to_value(&OperationAnswer::Plan {
                plan: Box::new(planned.plan),
                failures,
                evidence: planned.evidence.map(Box::new),
            });
        }
        let operation = self.begin_operation(request, task).await?;
        to_value(&OperationAnswer::Accepted { operation })
    }

    async fn evidence(
        &self,
        request: &Request,
        mut options: EvacuateOptions,
    ) -> Result<EvidenceAnswer, RemoteFailure> {
        options.automatic = false;
        let by = requester(request.context());
        let seen = evacuation::inspect(&self.context, &options, &by).await;
        let (evidence, mut failures) = seen.map_err(|e| store_failure(&e))?;
        let other = self.context.store.active_operation(Some(&options.host));
        let other = other.await.map_err(|e| store_failure(&e))?;
        // Asked for again, it is answered with the one that is under way.
        if other.is_some_and(|o| matches!(o.task, Task::Evacuate(_))) {
            failures.clear();
        }
        Ok(EvidenceAnswer { evidence, failures })
    }

    /// Puts an operation on the record and has it driven; acknowledges the
    /// request then (invariant 5).
    pub(super) async fn begin_operation(
        &self,
        request: &Request,
        task: Task,
    ) -> Result<Box<Operation>, RemoteFailure> {
        let (kind, by) = (task.kind(), requester(request.context()));
        let begun = self.operations.begin(task, by, request.unique_id()).await;
        match begun.map_err(|e| store_failure(&e))? {
            begin::Answer::Accepted(operation) => {
                request.accept().await;
                Ok(operation)
            }
            begin::Answer::Refused(checks) => Err(failure::operation_refused(kind, &checks)),
        }
    }

    async fn operation(&self, ask: &OperationRef) -> Result<Operation, RemoteFailure> {
        let found = self.context.store.find_operation(&ask.operation).await;
        found.map_err(|e| store_failure(&e))
    }

    /// An operation with its migrations under way, in the order of its guests.
    async fn operation_view(&self, operation: Operation) -> Result<OperationView, RemoteFailure> {
        let migrations = self.context.store.migrations_of(operation.uuid).await;
        let migrations = migrations.map_err(|e| store_failure(&e))?;
        Ok(view(operation, migrations))
    }

    /// Answers when the operation's record has changed since the caller saw it,
    /// or a migration of it now.
    async fn wait_operation(&self, ask: &WaitOperation) -> Result<OperationView, RemoteFailure> {
        let store = &self.context.store;
        let slot = self.waits.try_acquire();
        let longest = if slot.is_ok() { LONGEST } else { SHORT };
        let deadline = Instant::now() + Duration::from_millis(ask.timeout_ms).min(longest);
        let mut watch = (store.operation_changes(), store.changes());
        let reference = OperationRef {
            operation: ask.operation.clone(),
        };
        let operation = self.operation(&reference).await?;
        let id = operation.uuid;
        let mut seen = self.operation_view(operation).await?;
        let versions = versions(&seen);
        while seen.operation.version <= ask.seen_version
            && !seen.operation.status.is_final()
            && Instant::now() < deadline
            && versions == self::versions(&seen)
        {
            let until = deadline.min(Instant::now() + LOOK);
            let _ = timeout_at(until, changed(&mut watch, id, &versions)).await;
            let now = store.operation(id).await.map_err(|e| store_failure(&e))?;
            seen = self.operation_view(now).await?;
        }
        Ok(seen)
    }

    async fn cancel_operation(&self, ask: &OperationRef) -> Result<Operation, RemoteFailure> {
        let found = self.operation(ask).await?;
        let now_ms = self.context.clock.now_ms();
        let mut over = false;
        let change = |o: &mut Operation| {
            over = o.status.is_final();
            let news = !over && !std::mem::replace(&mut o.cancel_requested, true);
            if news {
                crate::operation::record::decide(o, now_ms, "asked to be called off");
            }
            news
        };
        let changed = self
            .context
            .store
            .update_operation(found.uuid, None, change)
            .await;
        let operation = changed.map_err(|e| store_failure(&e))?;
        if over {
            return Err(failure::operation_over(&operation, "cancel"));
        }
        info!(operation = operation.id, "asked to be called off");
        Ok(operation)
    }

    async fn set_automation(&self, ask: &SetAutomation) -> Result<Automation, RemoteFailure> {
        let store = &self.context.store;
        let evacuate = auto_evacuate::SWITCH;
        for (name, wanted) in [(evacuate, ask.evacuate), (balancer::SWITCH, ask.balance)] {
            if let Some(is_on) = wanted {
                let switched = store.switch(name, is_on).await;
                switched.map_err(|e| store_failure(&e))?;
                info!(name, is_on, "switched");
            }
        }
        let is_on = store.is_switched_on(balancer::SWITCH).await;
        let is_on = is_on.map_err(|e| store_failure(&e))?;
        let mode = self.context.balance.mode;
        let balance = match mode {
            BalanceMode::Off => mode.as_str(),
            _ if !is_on => "paused",
            _ => mode.as_str(),
        };
        let is_on = store.is_switched_on(evacuate).await;
        let evacuate = match self.context.auto_evacuate.is_on {
            false => "off",
            true if is_on.map_err(|e| store_failure(&e))? => "on",
            true => "paused",
        };
        Ok(Automation {
            evacuate: evacuate.to_owned(),
            balance: balance.to_owned(),
        })
    }
}

fn view(operation: Operation, migrations: Vec<Migration>) -> OperationView {
    let places = operation.items.iter().enumerate();
    let places: HashMap<_, _> = places.map(|(at, i)| (i.planned.instance, at)).collect();
    let mut migrations: Vec<_> = migrations
        .into_iter()
        .filter(|m| !m.status.rests())
        .collect();
    migrations.sort_by_key(|m| places.get(&m.instance_uuid).copied());
    OperationView {
        operation,
        migrations,
    }
}

fn versions(view: &OperationView) -> HashMap<MigrationId, u64> {
    let versions = view.migrations.iter().map(|m| (m.uuid, m.version));
    versions.collect()
}

/// Resolves when the operation or one of these migrations may have changed.
async fn changed(
    (operations, migrations): &mut (
        broadcast::Receiver<OperationId>,
        broadcast::Receiver<MigrationId>,
    ),
    id: OperationId,
    of: &HashMap<MigrationId, u64>,
) {
    // Lagging behind is as good as a change: look.
    let operation = async { while matches!(operations.recv().await, Ok(other) if other != id) {} };
    let migration =
        async { while matches!(migrations.recv().await, Ok(other) if !of.contains_key(&other)) {} };
    tokio::select! {
        biased;
        () = operation => {}
        () = migration => {}
    }
}
