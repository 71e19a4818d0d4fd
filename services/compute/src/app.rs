//! The agent put together over its two traits, hypervisor and transport: by
//! `main` with libvirt and a broker, by tests with fakes.

use std::{sync::Arc, time::Duration};

use drover_model::api::{COMPUTE_TOPIC, conductor::AgentLeaves};
use drover_rpc::{MessagingSettings, RpcClient, RpcServer, Transport, TransportError};
use drover_runtime::error_chain::Chain;
use tokio::{sync::watch, task::JoinHandle};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tracing::info;

use crate::{
    api::{Steps, nova::NovaCompute},
    conductor::Conductor,
    hypervisor::Hypervisor,
    journal::{Journal, JournalError},
    migration::Registry,
    node::{AgentSettings, Clock, Counters, Node},
    report, returning,
    standing::{self, Standing},
};

/// How long steps under way may take when the agent is asked to stop. Transfers
/// are not waited for: libvirtd carries them on, and the next start finds them.
const STOP_GRACE: Duration = Duration::from_secs(5);

/// An agent at work.
pub struct AgentHandle {
    node: Arc<Node>,
    client: RpcClient,
    serving: Option<JoinHandle<Option<Result<(), TransportError>>>>,
    ready: watch::Receiver<bool>,
    stop_serving: CancellationToken,
}

/// An agent, see [`Agent::start`].
pub struct Agent;

impl Agent {
    /// Takes up what the journal says was under way and begins to serve. Waits
    /// for neither libvirt nor the broker: it works with whichever is there.
    ///
    /// # Errors
    /// The journal's directory cannot be used.
    pub fn start(
        hypervisor: Arc<dyn Hypervisor>,
        transport: Arc<dyn Transport>,
        messaging: &MessagingSettings,
        settings: AgentSettings,
        clock: Clock,
    ) -> Result<AgentHandle, JournalError> {
        let journal = Journal::open(&settings.state_dir, &settings.state_disk)?;
        let identity = standing::identity(journal.state(), &settings);
        let client = RpcClient::new(transport.clone(), messaging);
        let (conductor, reports) = Conductor::new(client.clone(), transport.clone());
        let node = Arc::new(Node {
            hypervisor,
            journal,
            conductor,
            settings,
            clock,
            counters: Counters::default(),
            tasks: TaskTracker::new(),
            stop: CancellationToken::new(),
            has_asked: watch::Sender::new(false),
            identity,
            standing: watch::Sender::new(Standing::Asking),
            refused: watch::Sender::new(None),
        });
        let registry = Registry::start(node.clone())?;
        drop(node.spawn(standing::run(node.clone())));
        drop(node.spawn(report::forward(node.clone(), reports)));
        drop(node.spawn(report::run(node.clone(), registry.clone())));
        drop(node.spawn(returning::run(node.clone(), registry.clone())));
        let (set_ready, ready) = watch::channel(false);
        let stop_serving = CancellationToken::new();
        let server = Server {
            steps: Arc::new(Steps {
                node: node.clone(),
                registry: registry.clone(),
                version: node.settings.speaks.max.to_string(),
            }),
            nova: Arc::new(NovaCompute {
                node: node.clone(),
                registry,
            }),
            transport,
            messaging: messaging.clone(),
            ready: set_ready,
            stop: stop_serving.clone(),
        };
        let serving = node.spawn(server.run());
        Ok(AgentHandle {
            node,
            client,
            serving: Some(serving),
            ready,
            stop_serving,
        })
    }
}

impl AgentHandle {
    /// Resolves when requests are being taken.
    pub async fn ready(&mut self) {
        // The sender goes only with the whole agent; then there is no use waiting.
        drop(self.ready.wait_for(|ready| *ready).await);
    }

    /// Resolves when serving has ended by itself, with the reason.
    pub async fn failed(&mut self) -> String {
        let Some(serving) = &mut self.serving else {
            return std::future::pending().await;
        };
        let ended = serving.await;
        self.serving = None;
        match ended {
            Ok(Some(Err(e))) => Chain(&e).to_string(),
            Ok(_) => "the RPC server stopped".to_owned(),
            Err(e) => format!("the RPC server died: {e}"),
        }
    }

    /// Lets steps under way end, then stops. Transfers go on without the agent.
    pub async fn stop(mut self) {
        self.stop_serving.cancel();
        if let Some(serving) = self.serving.take() {
            drop(tokio::time::timeout(STOP_GRACE * 2, serving).await);
        }
        self.say_good_bye().await;
        self.client.close().await;
        self.node.stop.cancel();
        self.node.tasks.close();
        self.node.tasks.wait().await;
    }

    async fn say_good_bye(&self) {
        let incarnation = self.node.standing.borrow().incarnation();
        let Some(incarnation) = incarnation else {
            return;
        };
        let who = AgentLeaves {
            host: self.node.settings.host.clone(),
            incarnation,
        };
        if let Err(e) = self.node.conductor.leave(&who).await {
            info!(
                "the conductor was not told that the agent stops: {}",
                Chain(&e)
            );
        }
    }

    /// Stops at once and in the middle of everything, as `kill -9` would.
    pub fn kill(self) {
        self.node.stop.cancel();
    }
}

struct Server {
    steps: Arc<Steps>,
    nova: Arc<NovaCompute>,
    transport: Arc<dyn Transport>,
    messaging: MessagingSettings,
    ready: watch::Sender<bool>,
    stop: CancellationToken,
}

impl Server {
    /// Serves whenever this is the node's agent. The queue is the node's: who is
    /// not takes nothing from it.
    async fn run(self) -> Result<(), TransportError> {
        let node = self.steps.node.clone();
        let mut standing = node.standing.subscribe();
        loop {
            let admitted = standing.wait_for(|s| s.incarnation().is_some());
            tokio::select! {
                biased;
                admitted = admitted => drop(admitted),
                () = self.stop.cancelled() => return Ok(()),
            }
            let Some(server) = self.start().await? else {
                return Ok(());
            };
            info!(host = %node.settings.host, "serving");
            self.ready.send_replace(true);
            let refused = standing.wait_for(|s| s.incarnation().is_none());
            let is_over = tokio::select! {
                biased;
                refused = refused => refused.is_err(),
                () = self.stop.cancelled() => true,
            };
            server.stop(STOP_GRACE).await;
            if is_over {
                return Ok(());
            }
            self.ready.send_replace(false);
        }
    }

    async fn start(&self) -> Result<Option<RpcServer>, TransportError> {
        let host = &self.steps.node.settings.host;
        let server = RpcServer::builder(
            self.transport.clone(),
            &self.messaging,
            COMPUTE_TOPIC,
            host.as_str(),
        )
        .shared_endpoint(self.steps.clone())
        .shared_endpoint(self.nova.clone());
        tokio::select! {
            biased;
            server = server.start() => server.map(Some),
            () = self.stop.cancelled() => Ok(None),
        }
    }
}
