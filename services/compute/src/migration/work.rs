//! A part of a cold migration's or a transfer's work that takes long, beside its
//! actor: the guest shuts down, files are sent, a guest changes hands. It may be
//! cancelled at any moment, and done again from the beginning: what was reached
//! before is found.

use std::{sync::Arc, time::Duration};

use drover_model::{
    api::{
        compute::{JobState, Outcome},
        fault::Fault,
    },
    guest::{PowerState, Presence},
    ids::{InstanceId, MigrationId},
    migration::{ColdOptions, Phase, Progress, Transfer},
};
use tokio::{
    sync::{broadcast, watch},
    task::JoinHandle,
    time::{Instant, sleep_until},
};
use tokio_util::sync::CancellationToken;
use tracing::warn;

use super::{
    destroy::{self, Allowed},
    transfer,
    voice::Voice,
};
use crate::{
    hypervisor::{Event, HypervisorError, SendError, SendSpec, Sent},
    journal::Ended,
    node::Node,
};

/// How long a guest may take to shut down if nobody says, seconds.
const SHUTDOWN_TIMEOUT_S: u64 = 120;
/// Time between two requests to shut down: a guest may have been busy booting.
const ASK_AGAIN: Duration = Duration::from_secs(15);
/// Time between two looks at a guest that shuts down; events come sooner.
const LOOK: Duration = Duration::from_millis(500);
/// Pause while libvirt is away.
pub(super) const AWAY: Duration = Duration::from_secs(1);
/// How long libvirt may be away before the part is given up.
pub(super) const LONGEST_AWAY: Duration = Duration::from_secs(60);

/// Why a guest that ran is not yet started again.
pub(super) const IN_SHUTDOWN: &str = "the guest is in shutdown, and this node's libvirt has not \
                                      tidied up after it yet: it is started again when it is off; \
                                      if its QEMU does not go, end that";

/// What is to be done.
pub(super) enum Task {
    /// Have the guest shut down.
    Stop {
        /// How long that may take, and what may be done about it.
        options: ColdOptions,
        /// What earlier parts have carried.
        disk: Transfer,
    },
    /// Send files.
    Send {
        /// Which.
        spec: SendSpec,
        /// What is shown meanwhile.
        phase: Phase,
        /// Of all bytes to carry, those that earlier parts carried.
        before_bytes: u64,
        /// Bytes to carry in all parts.
        total_bytes: u64,
    },
    /// A part of a transfer to another project.
    Transfer(transfer::Task),
}

/// Work on a part under way.
pub(super) struct Work<P> {
    part: P,
    view: watch::Receiver<JobState>,
    cancel: CancellationToken,
    handle: JoinHandle<Option<Ended>>,
}

impl<P> Work<P> {
    /// Begins.
    pub(super) fn begin(
        node: &Arc<Node>,
        migration: MigrationId,
        instance: InstanceId,
        part: P,
        task: Task,
    ) -> Self {
        let (shown, view) = watch::channel(JobState::Running {
            progress: Box::new(Progress::default()),
        });
        let cancel = CancellationToken::new();
        let worker = Worker {
            node: node.clone(),
            instance,
            cancel: cancel.clone(),
            voice: Voice::new(node.clone(), migration, shown),
            progress: Progress::default(),
            begun: Instant::now(),
        };
        let handle = node.spawn(worker.run(task));
        Self {
            part,
            view,
            cancel,
            handle,
        }
    }

    /// Where it stands.
    pub(super) fn job(&self) -> JobState {
        self.view.borrow().clone()
    }

    /// Has it end soon.
    fn cancel(&self) {
        self.cancel.cancel();
    }

    /// How it ended. May be dropped and asked again.
    async fn over(&mut self) -> Ended {
        match (&mut self.handle).await {
            Ok(Some(ended)) => ended,
            // Stopped with the agent, or died of a mistake of its own.
            Ok(None) | Err(_) => Ended {
                outcome: Outcome::Failed {
                    message: "the agent's work on it died".to_owned(),
                },
                progress: Progress::default(),
            },
        }
    }
}

/// The parts of one migration's work: at most one is under way.
pub(super) struct Parts<P> {
    under_way: Option<Work<P>>,
    /// How the first one ended that did not go well, in this life of the agent.
    failed: Option<Outcome>,
    /// How the last one ended, in this life of the agent.
    last: Option<(P, Ended)>,
}

impl<P: Copy + PartialEq> Parts<P> {
    /// None was begun in this life of the agent.
    pub(super) fn none() -> Self {
        Self {
            under_way: None,
            failed: None,
            last: None,
        }
    }

    /// This one is begun.
    pub(super) fn begin(&mut self, work: Work<P>) {
        self.under_way = Some(work);
        self.last = None;
    }

    /// How all of it ended that did not go well.
    pub(super) fn failure(&self) -> Outcome {
        let unknown = || failed("it was taken back");
        self.failed.clone().unwrap_or_else(unknown)
    }

    /// How a part stands; nothing if it has to be begun.
    pub(super) fn job(&self, part: P) -> Result<Option<JobState>, Fault> {
        match &self.under_way {
            Some(work) if work.part == part => return Ok(Some(work.job())),
            Some(_) => return Err(Fault::not_now("another part of it is still under way")),
            None => {}
        }
        let last = self.last.as_ref().filter(|(of, _)| *of == part);
        Ok(last.map(|(_, ended)| ended.clone().into()))
    }

    /// Which part is under way.
    pub(super) fn under_way(&self) -> Option<P> {
        self.under_way.as_ref().map(|work| work.part)
    }

    /// Has the part under way end, and tells how it did.
    pub(super) async fn cancel(&mut self) -> Option<(P, Ended)> {
        self.under_way.as_ref()?.cancel();
        Some(self.over().await)
    }

    /// The end of the part under way; for ever silent if none is.
    pub(super) async fn over(&mut self) -> (P, Ended) {
        match &mut self.under_way {
            Some(work) => {
                let ended = work.over().await;
                (work.part, ended)
            }
            None => std::future::pending().await,
        }
    }

    /// A part is over.
    pub(super) fn ended(&mut self, part: P, ended: Ended) {
        self.under_way = None;
        if !matches!(ended.outcome, Outcome::Moved { .. }) {
            self.failed.get_or_insert_with(|| ended.outcome.clone());
        }
        self.last = Some((part, ended));
    }

    /// How the last one ended is not to be told again.
    pub(super) fn forget(&mut self) {
        self.last = None;
    }
}

/// Who does it.
pub(super) struct Worker {
    pub(super) node: Arc<Node>,
    pub(super) instance: InstanceId,
    pub(super) cancel: CancellationToken,
    pub(super) voice: Voice,
    pub(super) progress: Progress,
    begun: Instant,
}

impl Worker {
    async fn run(mut self, task: Task) -> Ended {
        let outcome = match task {
            Task::Stop { options, disk } => {
                self.progress.disk = disk;
                self.stop(&options).await
            }
            Task::Send {
                spec,
                phase,
                before_bytes,
                total_bytes,
            } => {
                self.progress.phase = phase;
                self.send(spec, before_bytes, total_bytes).await
            }
            Task::Transfer(task) => self.transfer(task).await,
        };
        self.progress.elapsed_ms = millis(self.begun.elapsed());
        self.progress.eta_ms = None;
        self.progress.patience_ms = None;
        self.progress.note = None;
        let ended = Ended {
            outcome,
            progress: self.progress,
        };
        self.voice.end(&ended);
        ended
    }

    // ---- shutting down

    /// Asks, and asks again, until the guest is off or patience ends. Stops it
    /// hard only if the caller allowed it (invariant 6).
    async fn stop(&mut self, options: &ColdOptions) -> Outcome {
        self.progress.phase = Phase::Stopping;
        let begun = Instant::now();
        let after = |seconds: u64| begun + Duration::from_secs(seconds);
        let force_at = options.force_stop_after_s.map(after);
        let patience_s = options.shutdown_timeout_s.unwrap_or(SHUTDOWN_TIMEOUT_S);
        // With permission to stop hard, patience is as long as that says.
        let given_up_at = after(patience_s).max(force_at.unwrap_or(begun));
        let mut events = self.node.hypervisor.events();
        let mut ask_at = begun;
        let mut away_since = None;
        loop {
            let now = Instant::now();
            let seen = self.node.hypervisor.presence(self.instance).await;
            let mut pause = LOOK;
            match (seen, Allowed::by(options, begun, now)) {
                (Ok(Presence::Present(state)), _) if !state.is_active() => return done(),
                (Ok(Presence::Absent), _) => return failed("the guest is no longer on this node"),
                (Ok(_), Some(allowed)) => {
                    self.voice.decided(format!(
                        "stopped hard, as allowed, after {} s",
                        now.duration_since(begun).as_secs()
                    ));
                    if let Err(e) = destroy::stop(&self.node, self.instance, &allowed).await {
                        warn!(instance = %self.instance, error = %e, "the guest was not stopped");
                        pause = AWAY;
                    }
                }
                (Ok(_), None) if now >= given_up_at => {
                    return Outcome::Stalled {
                        message: format!(
                            "the guest did not shut down within {patience_s} s of being asked to"
                        ),
                        of_guest: true,
                    };
                }
                (Ok(Presence::Present(PowerState::Running)), None) if now >= ask_at => {
                    ask_at = now + ASK_AGAIN;
                    self.ask_to_shut_down().await;
                }
                (Ok(_), None) => {}
                (Err(error), _) => {
                    pause = AWAY;
                    let since = *away_since.get_or_insert(now);
                    if now.duration_since(since) >= LONGEST_AWAY {
                        return failed(&error.to_string());
                    }
                    self.progress.note = Some(format!("waiting for this node's libvirt: {error}"));
                }
            }
            self.show_waiting(begun, given_up_at, force_at);
            tokio::select! {
                biased;
                () = self.cancel.cancelled() => return Outcome::Aborted,
                () = something(&mut events, self.instance) => {}
                () = sleep_until(now + pause) => {}
            }
        }
    }

    async fn ask_to_shut_down(&mut self) {
        match self.node.hypervisor.shut_down(self.instance).await {
            // It went off in between.
            Ok(()) | Err(HypervisorError::WrongState(_)) => {}
            Err(error) => {
                self.voice
                    .decided(format!("asking it to shut down failed: {error}"));
            }
        }
    }

    fn show_waiting(&mut self, begun: Instant, given_up_at: Instant, force_at: Option<Instant>) {
        let (what, at) = match force_at {
            Some(at) => ("stopped hard", at),
            None => ("given up", given_up_at),
        };
        let whole = at.duration_since(begun).as_secs();
        self.progress.note = Some(format!(
            "waiting for the guest to shut down: {} s; {what} after {whole} s",
            begun.elapsed().as_secs()
        ));
        self.progress.elapsed_ms = millis(self.begun.elapsed());
        self.progress.patience_ms = Some(millis(given_up_at.duration_since(Instant::now())));
        self.voice.show(&self.progress);
    }

    // ---- sending

    async fn send(&mut self, spec: SendSpec, before_bytes: u64, total_bytes: u64) -> Outcome {
        let (shown, mut view) = watch::channel(Sent::default());
        let hypervisor = self.node.hypervisor.clone();
        let sending = hypervisor.send(spec, shown, self.cancel.clone());
        tokio::pin!(sending);
        let ended = loop {
            tokio::select! {
                biased;
                ended = &mut sending => break ended,
                changed = view.changed() => {
                    let sent = *view.borrow_and_update();
                    self.show_sent(sent, before_bytes, total_bytes);
                    if changed.is_err() {
                        break sending.await;
                    }
                }
            }
        };
        let sent = *view.borrow();
        self.show_sent(sent, before_bytes, total_bytes);
        match ended {
            Ok(sent) => {
                if sent.reconnects > 0 {
                    let times = sent.reconnects;
                    self.voice.decided(format!(
                        "the connection broke {times} time(s); went on where it stopped"
                    ));
                }
                let mib = sent.reused_bytes >> 20;
                if mib > 0 {
                    self.voice
                        .decided(format!("{mib} MiB were there already, and were not sent"));
                }
                if self.progress.phase == Phase::Disk {
                    // What was planned is what the file systems said, which is rounded.
                    let disk = &mut self.progress.disk;
                    disk.total_bytes = disk.processed_bytes;
                    disk.remaining_bytes = 0;
                }
                done()
            }
            Err(SendError::Cancelled) => Outcome::Aborted,
            Err(SendError::Stalled(message)) => Outcome::Stalled {
                message,
                of_guest: false,
            },
            Err(SendError::Failed(message)) => Outcome::Failed { message },
        }
    }

    fn show_sent(&mut self, sent: Sent, before_bytes: u64, total_bytes: u64) {
        let processed = before_bytes.saturating_add(sent.done_bytes);
        let total = total_bytes.max(before_bytes.saturating_add(sent.total_bytes));
        self.show_bytes(processed, total);
    }

    /// Shows how far disks are.
    pub(super) fn show_bytes(&mut self, processed: u64, total: u64) {
        let elapsed_ms = millis(self.begun.elapsed());
        let passed = elapsed_ms.saturating_sub(self.progress.elapsed_ms);
        let before = self.progress.disk.processed_bytes;
        let processed = processed.max(before);
        // Too short a time tells no rate.
        if passed >= 100 {
            let now = processed.saturating_sub(before).saturating_mul(1000) / passed;
            let old = self.progress.rate_bytes_s;
            self.progress.rate_bytes_s = if old == 0 { now } else { (old * 3 + now) / 4 };
            self.progress.elapsed_ms = elapsed_ms;
        }
        let remaining = total.saturating_sub(processed);
        self.progress.disk = Transfer {
            total_bytes: total,
            processed_bytes: processed,
            remaining_bytes: remaining,
        };
        self.progress.eta_ms = (self.progress.rate_bytes_s > 0)
            .then(|| remaining.saturating_mul(1000) / self.progress.rate_bytes_s);
        self.voice.show(&self.progress);
    }
}

/// It went well.
pub(super) fn done() -> Outcome {
    Outcome::Moved {
        downtime_ms: None,
        total_ms: None,
    }
}

/// It did not, for this reason.
pub(super) fn failed(message: &str) -> Outcome {
    Outcome::Failed {
        message: message.to_owned(),
    }
}

/// Milliseconds of a time.
pub(super) fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

/// Something happened to the guest, or to libvirt. Without events, for ever silent.
async fn something(events: &mut broadcast::Receiver<Event>, instance: InstanceId) {
    loop {
        match events.recv().await {
            Ok(Event::Guest(id)) if id == instance => return,
            Ok(Event::Connection { .. }) | Err(broadcast::error::RecvError::Lagged(_)) => return,
            Ok(_) => {}
            Err(broadcast::error::RecvError::Closed) => std::future::pending().await,
        }
    }
}
