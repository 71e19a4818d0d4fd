//! A transfer as its actor holds it: begun, watched, given orders, over.

use std::{sync::Arc, time::Duration};

use drover_model::{
    api::{compute::JobState, fault::Fault},
    ids::MigrationId,
    migration::Progress,
};
use tokio::{
    sync::{mpsc, watch},
    task::JoinHandle,
};

use super::{
    monitor::{Monitor, limits},
    orders::Order,
    policy::QEMU_DEFAULT_DOWNTIME_MS,
};
use crate::{hypervisor::MigrateSpec, journal::SourceRecord, node::Node};

/// Orders that may wait for a monitor, which takes them at once.
const MAX_ORDERS: usize = 8;
/// Pause before a monitor that died is replaced.
const AFTER_DEATH: Duration = Duration::from_secs(1);

/// A transfer under way, as its actor holds it.
pub(super) struct Sending {
    /// As it was when the transfer began.
    pub(super) record: Box<SourceRecord>,
    view: watch::Receiver<JobState>,
    orders: mpsc::Sender<Order>,
    monitor: JoinHandle<Option<SourceRecord>>,
    died: bool,
}

/// The monitor died of a mistake of its own.
pub(super) struct MonitorDied;

impl Sending {
    /// Begins a transfer if a spec is given, else looks for it; watches it.
    pub(super) fn watch(
        node: &Arc<Node>,
        migration: MigrationId,
        record: SourceRecord,
        begin: Option<MigrateSpec>,
    ) -> Self {
        let (orders, taken) = mpsc::channel(MAX_ORDERS);
        let (shown, view) = watch::channel(JobState::Running {
            progress: Box::new(Progress::default()),
        });
        let kept = Box::new(record.clone());
        let monitor = Monitor::new(node.clone(), migration, record, begin, taken, shown);
        Self {
            record: kept,
            view,
            orders,
            monitor: node.spawn(monitor.run()),
            died: false,
        }
    }

    /// The transfer's record once it is over. May be dropped and asked again.
    pub(super) async fn over(&mut self) -> Result<Box<SourceRecord>, MonitorDied> {
        if !self.died {
            match (&mut self.monitor).await {
                Ok(Some(record)) => return Ok(Box::new(record)),
                Ok(None) | Err(_) => self.died = true,
            }
        }
        // So that one that dies at once again does not keep a processor busy.
        tokio::time::sleep(AFTER_DEATH).await;
        Err(MonitorDied)
    }

    /// Where it stands.
    pub(super) fn job(&self) -> JobState {
        self.view.borrow().clone()
    }

    /// Passes an order on to the monitor, which answers it.
    pub(super) fn give(&self, order: Order) {
        match self.orders.try_send(order) {
            Ok(()) => {}
            Err(mpsc::error::TrySendError::Full(order)) => {
                order.answer(Err(Fault::not_now("too many orders are waiting already")));
            }
            // It has just ended: its outcome is the answer.
            Err(mpsc::error::TrySendError::Closed(order)) => order.answer(Ok(())),
        }
    }

    pub(super) fn is_over(&self) -> bool {
        matches!(*self.view.borrow(), JobState::Ended { .. })
    }
}

/// What the driver is asked for.
pub(super) fn spec(node: &Node, record: &SourceRecord) -> MigrateSpec {
    let request = &record.request;
    let start_ms = limits(node, record).start_downtime_ms();
    MigrateSpec {
        instance: request.instance,
        dest_libvirt_uri: request.destination.libvirt_uri.clone(),
        dest_address: request.destination.address.clone(),
        copied_disks: request.copied_disks.clone(),
        shared_disks: request.shared_disks.clone(),
        // What QEMU does anyway need not be said.
        initial_downtime_ms: (start_ms != QEMU_DEFAULT_DOWNTIME_MS).then_some(start_ms),
        options: request.options.clone(),
    }
}

/// How an ended transfer is told.
pub(super) fn job_of(record: &SourceRecord) -> JobState {
    record.ended.clone().map_or(JobState::Unknown, Into::into)
}
