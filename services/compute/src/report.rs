//! Reports on the node: every few seconds, and soon after something happened.
//! Each one is the whole truth of the node at a moment, so a lost one is made
//! good by the next. While libvirt is away it says so, and nothing about guests
//! (invariant 3).

use std::{sync::Arc, time::Duration};

use drover_model::node::{HypervisorReport, NodeReport};
use drover_runtime::error_chain::Chain;
use tokio::{
    sync::{broadcast, mpsc},
    time::{Instant, sleep_until, timeout_at},
};
use tracing::{debug, info, warn};

use crate::{
    hypervisor::{Event, HypervisorError},
    migration::Registry,
    node::{Counters, Node},
};

/// What happens together is reported together.
const DEBOUNCE: Duration = Duration::from_millis(100);
/// So many reports may wait to be read: with the usual interval as long as it takes
/// until a silent node counts as down.
const REPORTS_THAT_WAIT: u32 = 6;
/// Shortest time between reports, however much happens.
const MIN_PAUSE: Duration = Duration::from_secs(1);

/// Reports for as long as the agent runs.
pub(crate) async fn run(node: Arc<Node>, registry: Arc<Registry>) {
    Reporter {
        events: node.hypervisor.events(),
        started_ms: node.now_ms(),
        sequence: 0,
        libvirt_up: None,
        conductor_heard: true,
        node,
        registry,
    }
    .run()
    .await;
}

/// Sends the reports on migrations that wait, in order.
pub(crate) async fn forward(
    node: Arc<Node>,
    mut waiting: mpsc::Receiver<drover_model::api::conductor::MigrationReport>,
) {
    while let Some(report) = waiting.recv().await {
        match node.conductor.send_report(&report).await {
            Ok(()) => Counters::add(&node.counters.migration_reports_sent),
            Err(e) => {
                debug!(migration = %report.migration, error = %Chain(&e), "a report is lost");
                Counters::add(&node.counters.migration_reports_lost);
            }
        }
    }
}

struct Reporter {
    node: Arc<Node>,
    registry: Arc<Registry>,
    events: broadcast::Receiver<Event>,
    started_ms: u64,
    sequence: u64,
    libvirt_up: Option<bool>,
    conductor_heard: bool,
}

impl Reporter {
    async fn run(mut self) {
        let interval = Duration::from_secs(self.node.settings.report_interval_s);
        loop {
            let began = Instant::now();
            let report = self.look().await;
            self.send(&report).await;
            self.wait(began, interval).await;
        }
    }

    async fn look(&mut self) -> NodeReport {
        let hypervisor = &self.node.hypervisor;
        let asked = tokio::try_join!(hypervisor.inventory(), hypervisor.guests());
        self.tell_change(asked.as_ref().err());
        let hypervisor = match asked {
            Ok((inventory, mut instances)) => {
                let under_way = self.registry.under_way();
                for instance in &mut instances {
                    instance.migration = under_way.get(&instance.id).copied();
                }
                HypervisorReport::Up {
                    inventory,
                    instances,
                }
            }
            Err(e) => HypervisorReport::Down {
                reason: e.to_string(),
            },
        };
        self.sequence += 1;
        let settings = &self.node.settings;
        NodeReport {
            host: settings.host.clone(),
            agent_version: env!("CARGO_PKG_VERSION").to_owned(),
            agent_started_ms: self.started_ms,
            sequence: self.sequence,
            clock_ms: self.node.now_ms(),
            endpoint: settings.endpoint.clone(),
            policy: settings.policy.clone(),
            hypervisor,
        }
    }

    /// One line when libvirt stops to answer, not one per report.
    fn tell_change(&mut self, error: Option<&HypervisorError>) {
        let up = error.is_none();
        if self.libvirt_up.replace(up) == Some(up) {
            return;
        }
        match error {
            // The driver itself says when its connection comes and goes.
            None | Some(HypervisorError::Unreachable { .. }) => {}
            Some(e) => warn!("{e}: the node is reported as down until libvirt answers"),
        }
    }

    async fn send(&mut self, report: &NodeReport) {
        let interval = Duration::from_secs(self.node.settings.report_interval_s);
        let waits = interval * REPORTS_THAT_WAIT;
        let sent = self.node.conductor.report_state(report, waits).await;
        let counters = &self.node.counters;
        match &sent {
            Ok(()) => Counters::add(&counters.node_reports_sent),
            Err(_) => Counters::add(&counters.node_reports_lost),
        }
        let heard = sent.is_ok();
        if std::mem::replace(&mut self.conductor_heard, heard) == heard {
            return;
        }
        match sent {
            Ok(()) => info!("reports go out again"),
            Err(e) => warn!(
                "the node's report did not go out: {}; going on trying",
                Chain(&e)
            ),
        }
    }

    /// Until it is time, or something happened.
    async fn wait(&mut self, began: Instant, interval: Duration) {
        let due = began + interval;
        if !self.something_happens_before(due).await {
            return;
        }
        let soon = (Instant::now() + DEBOUNCE).max(began + MIN_PAUSE).min(due);
        sleep_until(soon).await;
        // All that happened until now is in the report that follows.
        while !matches!(
            self.events.try_recv(),
            Err(broadcast::error::TryRecvError::Empty | broadcast::error::TryRecvError::Closed)
        ) {}
    }

    async fn something_happens_before(&mut self, due: Instant) -> bool {
        loop {
            match timeout_at(due, self.events.recv()).await {
                Err(_) => return false,
                Ok(Ok(Event::MigrationIteration(_))) => {}
                Ok(Ok(_) | Err(broadcast::error::RecvError::Lagged(_))) => return true,
                Ok(Err(broadcast::error::RecvError::Closed)) => {
                    sleep_until(due).await;
                    return false;
                }
            }
        }
    }
}
