//! Whoever asks for things: takes every answer, and none.

use std::sync::Arc;

use drover_compute::hypervisor::fake::Fabric;
use drover_model::{
    api::{
        CONDUCTOR_TOPIC, NAMESPACE, VERSION,
        conductor::{
            BalanceNodes, DrainNode, EvacuateNode, ListMigrations, ListOperations, MigrateInstance,
            MigrationRef, OperationRef, RestoreNode, RevertMigration, TransferInstance, method,
        },
    },
    ids::{HostName, InstanceId},
    migration::{
        ColdOptions, LiveOptions, Migration, MigrationStatus, TransferMode, TransferOptions, Way,
    },
    operation::{
        BalanceOptions, DrainOptions, EvacuateOptions, MoveMode, RestoreOptions, Returning,
    },
};
use drover_rpc::{RequestContext, RpcClient, RpcError, Target};
use drover_store::Store;
use serde::{Serialize, de::DeserializeOwned};
use serde_json::Value;

use super::{
    plan::Ask,
    trace::Trace,
    world::{PROJECTS, host},
};

/// An operator. Looks at the record as the command would, by asking.
pub(super) struct Operator {
    /// Asks.
    pub(super) client: RpcClient,
    /// Where ids are looked up.
    pub(super) store: Store,
    /// Where consent to older disks is noted.
    pub(super) fabric: Fabric,
    /// Hears what was answered.
    pub(super) trace: Trace,
}

impl Operator {
    /// Calls a conductor.
    ///
    /// # Errors
    /// As [`RpcClient::call`].
    pub(super) async fn call<A, R>(&self, method: &str, args: &A) -> Result<R, RpcError>
    where
        A: Serialize + Sync,
        R: DeserializeOwned,
    {
        let target = Target::topic(CONDUCTOR_TOPIC)
            .namespace(NAMESPACE)
            .version(VERSION);
        let context = RequestContext::service("req-swarm");
        self.client.call(&target, &context, method, args).await
    }

    /// Says whether it is taken.
    async fn tell<A: Serialize + Sync>(&self, method: &str, args: &A) -> bool {
        let answer = self.call::<A, Value>(method, args).await;
        let is_taken = answer.is_ok();
        match answer {
            Ok(_) => self.trace.note("operator", format_args!("{method}: taken")),
            Err(error) => {
                let text: String = error.to_string().chars().take(160).collect();
                self.trace
                    .note("operator", format_args!("{method}: {text}"));
            }
        }
        is_taken
    }

    /// The newest migration of a guest.
    async fn newest(&self, id: InstanceId) -> Option<Migration> {
        let all = ListMigrations::default();
        let all = self.store.migrations(&all, Some(id)).await;
        all.expect("readable").into_iter().next()
    }

    async fn migrate(&self, id: InstanceId, to: Option<usize>, way: &Way) {
        let ask = MigrateInstance::new(id.to_string(), to.map(name), way);
        self.tell(method::MIGRATE_INSTANCE, &ask).await;
    }

    async fn of_newest(&self, id: InstanceId, what: &str) {
        if let Some(m) = self.newest(id).await {
            let migration = m.uuid.to_string();
            self.tell(what, &MigrationRef { migration }).await;
        }
    }

    /// Taken of a guest that its dead destination may have run, it goes back without what
    /// it wrote there.
    async fn abort(&self, id: InstanceId) {
        let Some(m) = self.newest(id).await else {
            return;
        };
        let migration = m.uuid.to_string();
        let which = MigrationRef { migration };
        let is_taken = self.tell(method::ABORT_MIGRATION, &which).await;
        if is_taken && m.may_be_lost_with_dest() {
            self.fabric.accept_older_disks(id);
        }
    }

    async fn revert(&self, id: InstanceId) {
        let Some(m) = self.newest(id).await else {
            return;
        };
        if m.status != MigrationStatus::Finished {
            return;
        }
        self.fabric.accept_older_disks(id);
        let ask = RevertMigration {
            migration: m.uuid.to_string(),
            keep_changes: false,
        };
        self.tell(method::REVERT_MIGRATION, &ask).await;
    }
}

fn name(node: usize) -> HostName {
    host(node).parse().expect("a host name")
}

/// Asks for something; `off` are the nodes that have no power, as all can see.
pub(super) async fn asked(
    operator: Arc<Operator>,
    ask: Ask,
    guests: Vec<InstanceId>,
    off: Vec<usize>,
) {
    match ask {
        Ask::Live {
            guest,
            to,
            post_copy,
        } => {
            let options = LiveOptions {
                post_copy,
                ..LiveOptions::default()
            };
            operator
                .migrate(guests[guest], to, &Way::Live(options))
                .await;
        }
        Ask::Cold {
            guest,
            to,
            pre_copy,
            force,
        } => {
            let options = ColdOptions {
                pre_copy,
                force_stop_after_s: force.then_some(20),
                ..ColdOptions::default()
            };
            operator
                .migrate(guests[guest], to, &Way::Cold(options))
                .await;
        }
        Ask::Confirm { guest } => {
            operator
                .of_newest(guests[guest], method::CONFIRM_MIGRATION)
                .await;
        }
        Ask::Revert { guest } => operator.revert(guests[guest]).await,
        Ask::Transfer { guest, live } => {
            let mode = if live {
                TransferMode::Live
            } else {
                TransferMode::Cold
            };
            let ask = TransferInstance {
                instance: guests[guest].to_string(),
                project: PROJECTS[1].to_owned(),
                options: TransferOptions {
                    mode,
                    ..TransferOptions::default()
                },
                dry_run: false,
            };
            operator.tell(method::TRANSFER_INSTANCE, &ask).await;
        }
        Ask::Abort { guest } => operator.abort(guests[guest]).await,
        Ask::ForceComplete { guest } => {
            let what = method::FORCE_COMPLETE_MIGRATION;
            operator.of_newest(guests[guest], what).await;
        }
        nodes => operator_asks(&operator, nodes, &off).await,
    }
}

async fn operator_asks(operator: &Operator, ask: Ask, off: &[usize]) {
    let dry_run = false;
    match ask {
        Ask::Drain { node, mixed } => {
            let options = DrainOptions {
                mode: if mixed {
                    MoveMode::Mixed
                } else {
                    MoveMode::Live
                },
                ..DrainOptions::new(name(node))
            };
            operator
                .tell(method::DRAIN_NODE, &DrainNode { options, dry_run })
                .await;
        }
        Ask::Restore { node } => {
            let options = RestoreOptions {
                host: name(node),
                returning: Returning::All,
                mode: MoveMode::Live,
                max_parallel: None,
                unknown: Default::default(),
            };
            operator
                .tell(method::RESTORE_NODE, &RestoreNode { options, dry_run })
                .await;
        }
        Ask::Evacuate { node } => {
            let options = EvacuateOptions {
                confirmed_off: off.contains(&node),
                ..EvacuateOptions::new(name(node))
            };
            operator
                .tell(method::EVACUATE_NODE, &EvacuateNode { options, dry_run })
                .await;
        }
        Ask::Balance => {
            let options = BalanceOptions::default();
            operator
                .tell(method::BALANCE_NODES, &BalanceNodes { options, dry_run })
                .await;
        }
        _ => {
            let all = operator.store.operations(&ListOperations::default()).await;
            if let Some(newest) = all.expect("readable").first() {
                let operation = newest.uuid.to_string();
                operator
                    .tell(method::CANCEL_OPERATION, &OperationRef { operation })
                    .await;
            }
        }
    }
}
