//! The conductor put together: record, agents, runner and RPC server. `main`
//! runs it on RabbitMQ, tests on a transport in memory.

use std::{sync::Arc, time::Duration};

use drover_model::api::CONDUCTOR_TOPIC;
use drover_rpc::{MessagingSettings, Notifier, RpcClient, RpcServer, Transport, TransportError};
use drover_saga::Patience;
use drover_store::{Store, StoreError};
use tokio_util::sync::CancellationToken;
use tracing::info;

use crate::{
    agent_client::AgentClient,
    api::{ComputeTaskEndpoint, DroverEndpoint},
    checks::Liveness,
    clock::Clock,
    config::{BalanceSettings, ConductorSettings},
    ear,
    left_alone::Left,
    notify,
    operation::{
        active::Rounds,
        auto_evacuate::{self, AutoEvacuate},
        balancer,
        definitions::{self, Definitions},
        fence::Fences,
        load::Loads,
        runner::OperationRunner,
    },
    plan::{Costs, schedule::Limits},
    retention,
    task::runner::Runner,
};

/// How long running handlers may go on when the conductor stops.
const STOP_GRACE: Duration = Duration::from_secs(5);

/// Requests answered at once. Half of them may be waits (see `api::wait`), which
/// do nothing but must not keep others from being served.
const MAX_RUNNING: usize = 1024;

/// What every part of the conductor works with. Cheap to clone.
#[derive(Clone)]
pub struct Context {
    /// Name of this conductor.
    pub name: String,
    /// The record.
    pub store: Store,
    /// The agents.
    pub agents: AgentClient,
    /// The time.
    pub clock: Clock,
    /// Silence after which a node is down, ms.
    pub down_after_ms: u64,
    /// How long after it finished a cold migration is confirmed by itself, ms;
    /// 0 is never.
    pub confirm_window_ms: u64,
    /// What cuts nodes' power.
    pub fences: Fences,
    /// Definitions that are to be fetched.
    pub definitions: Definitions,
    /// Whether dead nodes are evacuated without being asked.
    pub auto_evacuate: AutoEvacuate,
    /// Most moves at one time.
    pub limits: Limits,
    /// What a move costs.
    pub costs: Costs,
    /// How load is balanced.
    pub balance: BalanceSettings,
    /// What guests use.
    pub loads: Loads,
    /// Which nodes have a dead one's guests.
    pub active: Rounds,
    /// What a newer Drover wrote.
    pub left_alone: Left,
}

impl Context {
    /// What counts as down, and the time.
    pub fn liveness(&self) -> Liveness {
        Liveness {
            down_after_ms: self.down_after_ms,
            now_ms: self.clock.now_ms(),
        }
    }
}

/// What looks after leases and whatever is not driven, each in a task of its own so
/// that none of it waits for another.
fn keep(runner: &Runner, operations: &OperationRunner, stop: &CancellationToken) {
    let (keeper, told) = (runner.clone(), stop.clone());
    tokio::spawn(async move { keeper.keep_leases(told).await });
    let (keeper, told) = (operations.clone(), stop.clone());
    tokio::spawn(async move { keeper.keep_leases(told).await });
    let (keeper, told) = (runner.clone(), stop.clone());
    tokio::spawn(async move { keeper.keep(told).await });
    let (keeper, told) = (runner.clone(), stop.clone());
    tokio::spawn(async move { keeper.keep_tidying(told).await });
    let (keeper, told) = (operations.clone(), stop.clone());
    tokio::spawn(async move { keeper.keep(told).await });
}

/// Why a conductor cannot start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The record.
    #[error("the record cannot be used")]
    Store(#[from] StoreError),
    /// The broker connection was closed for good.
    #[error("the conductor cannot serve")]
    Transport(#[from] TransportError),
}

/// A conductor at work.
pub struct Conductor {
    context: Context,
    server: RpcServer,
    client: RpcClient,
    runner: Runner,
    operations: OperationRunner,
    stop: CancellationToken,
}

impl Conductor {
    /// Takes up unfinished work, then serves. Waits for the broker.
    ///
    /// # Errors
    /// See [`StartError`].
    #[allow(clippy::too_many_arguments)] // Each is another's making.
    pub async fn start(
        settings: &ConductorSettings,
        name: &str,
        messaging: &MessagingSettings,
        transport: Arc<dyn Transport>,
        store: Store,
        clock: Clock,
        patience: Patience,
        fences: Fences,
    ) -> Result<Self, StartError> {
        let store = store.heard_apart();
        let client = RpcClient::new(transport.clone(), messaging);
        let context = Context {
            name: name.to_owned(),
            store: store.clone(),
            agents: AgentClient::new(client.clone(), settings.call_limits())
                .for_incarnations_of(store.hearing().clone()),
            clock,
            down_after_ms: settings.service_down_time_s * 1000,
            confirm_window_ms: settings.resize_confirm_window_s * 1000,
            fences,
            definitions: Definitions::default(),
            auto_evacuate: settings.auto_evacuate(),
            limits: settings.limits(),
            costs: Costs::default(),
            balance: settings.balance(),
            loads: Loads::new(settings.balance_duration_s * 1000),
            active: Rounds::default(),
            left_alone: Left::default(),
        };
        ear::begin(&context, settings.speaks).await?;
        let slots = settings.max_concurrent_migrations;
        let runner = Runner::new(context.clone(), name, settings.lease_s, slots, patience);
        let stop = CancellationToken::new();
        let clock = context.clock.clone();
        let now_ms = move || clock.now_ms();
        let publisher = format!("conductor.{name}");
        let notifier = Notifier::new(transport.clone(), messaging, publisher, now_ms);
        let clock = context.clock.clone();
        tokio::spawn(notify::publish(
            store,
            clock,
            notifier.clone(),
            stop.clone(),
        ));
        runner.recover().await?;
        tokio::spawn(definitions::keep(context.clone(), stop.clone()));
        let kept = settings.retention();
        tokio::spawn(retention::keep(context.clone(), kept, stop.clone()));
        let operations = OperationRunner::new(context.clone(), runner.clone());
        operations.recover().await?;
        tokio::spawn(auto_evacuate::watch(operations.clone(), stop.clone()));
        let drover = Arc::new(DroverEndpoint::new(
            context.clone(),
            (runner.clone(), operations.clone()),
            notifier.clone(),
            transport.stats().clone(),
        ));
        let server = RpcServer::builder(transport, messaging, CONDUCTOR_TOPIC, name)
            .shared_endpoint(drover.clone())
            .endpoint(ComputeTaskEndpoint::new(drover))
            .max_running(MAX_RUNNING)
            .start()
            .await?;
        tokio::spawn(ear::listen(context.clone(), client.clone(), stop.clone()));
        keep(&runner, &operations, &stop);
        tokio::spawn(balancer::keep(operations.clone(), notifier, stop.clone()));
        info!(conductor = name, "serves");
        Ok(Self {
            context,
            server,
            client,
            runner,
            operations,
            stop,
        })
    }

    /// Lets handlers finish, then lets go; the journal has the rest.
    pub async fn stop(self) {
        self.stop.cancel();
        self.server.stop(STOP_GRACE).await;
        self.operations.stop();
        self.runner.stop();
        self.client.close().await;
    }

    /// Migrations that it drives now. For tests.
    pub fn driven(&self) -> usize {
        self.runner.driven()
    }

    /// What its parts work with. For tests.
    pub fn context(&self) -> &Context {
        &self.context
    }

    /// Ends at once, as if the process had died. For tests.
    pub fn kill(self) {
        self.stop.cancel();
        self.operations.stop();
        self.runner.stop();
    }
}
