//! The task beside one transfer: samples it, carries out what [`policy`] and the
//! conductor decide, reports, and says how it ended.
//!
//! ```text
//!            migrate() runs                    ┌─ job gone, guest gone ──► Gone
//! Sending ──────────────────► its answer ──────┤─ job gone, guest here ──► Failed │ Aborted │ Stalled
//!    │                          ▲ lost: look   └─ libvirt away: wait, look again
//!    └─ found after a restart ──┘
//! ```
//!
//! Everything asked of the hypervisor runs beside the loop, so an answer that is
//! slow to come (the domain is locked at switch-over) delays neither an abort
//! nor the end of the transfer.
//!
//! This file is the loop: samples, reports, the end. What is wanted of a transfer
//! and how it is brought about is in [`orders`].
//!
//! [`policy`]: super::policy
//! [`orders`]: super::orders

use std::{sync::Arc, time::Duration};

use drover_model::{
    api::{
        compute::{JobState, Outcome},
        fault::Fault,
    },
    guest::Presence,
    ids::{InstanceId, MigrationId},
    migration::{Decision as Note, Phase},
};
use tokio::{
    sync::{broadcast, mpsc, watch},
    task::{JoinError, JoinSet},
    time::{Instant, sleep_until},
};
use tracing::{info, warn};

use super::{
    look::fingerprint,
    orders::{Act, Force, Order, Wishes},
    outcome,
    policy::{Decision, Limits, Policy},
    progress::{Circumstances, Shown},
    voice::Voice,
    waiting::{Transfer, answered, next_event},
};
use crate::{
    hypervisor::{Event, HypervisorError, Job, JobSample, MigrateSpec},
    journal::{Ended, SourceRecord},
    node::Node,
};

/// Pauses before the first samples; a small guest is gone before a slow one is due.
const FIRST_PAUSES_MS: [u64; 3] = [100, 150, 250];
/// Pause between later samples.
const PAUSE: Duration = Duration::from_millis(500);
/// Shortest pause when the hypervisor says there is something to see.
const SHORT_PAUSE: Duration = Duration::from_millis(50);
/// Pause while libvirt is away or a lost transfer's guest is looked for.
const LONG_PAUSE: Duration = Duration::from_secs(1);
/// How long an aborted transfer may take to end before its streams are cut.
pub(super) const LET_GO: Duration = Duration::from_secs(5);
/// Without a job, the guest must be seen here so often before the transfer
/// counts as failed: libvirtd may be about to begin what it was asked for.
const SIGHTINGS: u32 = 2;
/// Why a guest that somebody defines anew stays.
const REDEFINED: &str = "the guest's lasting definition was changed during the move, which would \
                         lose the change: ask again";
/// Decisions kept; a transfer takes a handful.
const MAX_DECISIONS: usize = 32;

/// What the hypervisor answered.
pub(super) enum Told {
    Sample(Result<Job, HypervisorError>),
    Seen(Result<Presence, HypervisorError>),
    /// Fingerprint of what lasts of the guest.
    Lasting(Result<Option<String>, HypervisorError>),
    /// The last is false for what may be possible later.
    Acted(Act, Result<(), Fault>, bool),
}

/// See the module.
pub(super) struct Monitor {
    pub(super) node: Arc<Node>,
    pub(super) migration: MigrationId,
    pub(super) instance: InstanceId,
    pub(super) record: SourceRecord,
    begun: Instant,
    /// Time the transfer had taken before this monitor began, ms.
    before_ms: u64,
    transfer: Option<Transfer>,
    pub(super) asked: JoinSet<Told>,
    orders: mpsc::Receiver<Order>,
    events: Option<broadcast::Receiver<Event>>,
    voice: Voice,
    policy: Policy,
    pub(super) shown: Shown,
    pub(super) wishes: Wishes,
    /// The guest runs on the destination already.
    pub(super) post_copy: bool,
    looking: bool,
    /// What lasts of the guest was asked for.
    comparing: bool,
    next_look: Instant,
    /// When the hypervisor last told how it goes.
    told_at: Instant,
    /// When the streams of a transfer that is being ended are cut.
    pub(super) cut_at: Option<Instant>,
    samples: usize,
    sightings: u32,
}

impl Monitor {
    /// A monitor of a transfer, which is begun if a spec is given and otherwise
    /// looked for.
    pub(super) fn new(
        node: Arc<Node>,
        migration: MigrationId,
        record: SourceRecord,
        begin: Option<MigrateSpec>,
        orders: mpsc::Receiver<Order>,
        view: watch::Sender<JobState>,
    ) -> Self {
        let begun = Instant::now();
        let limits = limits(&node, &record);
        let (policy, before_ms, first) = match &begin {
            Some(_) => (Policy::new(limits, 0), 0, FIRST_PAUSES_MS[0]),
            None => {
                let before_ms = node.now_ms().saturating_sub(record.started_at_ms);
                (Policy::attached(limits, 0), before_ms, 0)
            }
        };
        // Heard from the first moment on.
        let events = Some(node.hypervisor.events());
        let transfer = begin.map(|spec| {
            let hypervisor = node.hypervisor.clone();
            node.spawn(async move { hypervisor.migrate(spec).await })
        });
        let voice = Voice::new(node.clone(), migration, view);
        Self {
            shown: Shown::new(record.memory_bytes),
            instance: record.request.instance,
            node,
            migration,
            record,
            begun,
            before_ms,
            transfer,
            asked: JoinSet::new(),
            orders,
            events,
            voice,
            policy,
            wishes: Wishes::default(),
            post_copy: false,
            looking: false,
            comparing: false,
            next_look: begun + Duration::from_millis(first),
            told_at: begun,
            cut_at: None,
            samples: 0,
            sightings: 0,
        }
    }

    /// Runs until the transfer is over; gives back its record with the end in it.
    pub(super) async fn run(mut self) -> SourceRecord {
        if self.transfer.is_none() {
            self.act(Act::SetDowntime(self.policy.allowed_downtime_ms()));
        }
        let outcome = loop {
            let end = tokio::select! {
                biased;
                answer = answered(&mut self.transfer) => self.transfer_answered(answer),
                Some(told) = self.asked.join_next() => self.heard(told),
                Some(order) = self.orders.recv() => { self.obey(order); None }
                event = next_event(&mut self.events) => { self.notice(event); None }
                () = sleep_until(self.cut_at.unwrap_or(self.begun)), if self.cut_at.is_some() => {
                    self.cut();
                    None
                }
                () = sleep_until(self.next_look), if !self.looking => { self.look(); None }
            };
            if let Some(outcome) = end {
                break outcome;
            }
        };
        self.finish(outcome)
    }

    fn elapsed_ms(&self) -> u64 {
        let since = u64::try_from(self.begun.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.before_ms.saturating_add(since)
    }

    /// Clock of the policy: starts with this monitor, so that a restart of the
    /// agent is no time without progress.
    fn policy_ms(&self) -> u64 {
        u64::try_from(self.begun.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    fn transfer_answered(&mut self, answer: Result<(), HypervisorError>) -> Option<Outcome> {
        let outcome = outcome::from_answer(&answer, self.wishes.intent(), self.elapsed_ms());
        if let (None, Err(error)) = (&outcome, answer) {
            self.decide(format!(
                "{error}; watching the guest to see what became of it"
            ));
            self.next_look = Instant::now();
        }
        outcome
    }

    /// Asks for the job; its answer comes back through [`Self::hear`].
    fn look(&mut self) {
        self.looking = true;
        let (hypervisor, instance) = (self.node.hypervisor.clone(), self.instance);
        self.asked
            .spawn(async move { Told::Sample(hypervisor.job(instance).await) });
        if self.record.lasting.is_some() && self.may_turn_back() && !self.comparing {
            self.comparing = true;
            let (hypervisor, instance) = (self.node.hypervisor.clone(), self.instance);
            self.asked
                .spawn(async move { Told::Lasting(fingerprint(&*hypervisor, instance).await) });
        }
    }

    /// The guest runs here, and nobody has had the transfer end.
    fn may_turn_back(&self) -> bool {
        let stays = self.shown.progress().phase < Phase::PostCopy && !self.post_copy;
        stays && self.wishes.intent().is_none()
    }

    /// The hypervisor took along what lasted of the guest when it began, and removes
    /// here what lasts of it when it is over: what somebody defines in between would be
    /// lost.
    fn compare(&mut self, now: Result<Option<String>, HypervisorError>) {
        self.comparing = false;
        let is_changed = matches!(&now, Ok(Some(now)) if self.record.lasting.as_ref() != Some(now));
        if is_changed && self.may_turn_back() {
            self.decide(format!("given up: {REDEFINED}"));
            self.wishes.spare(REDEFINED.to_owned());
            self.pursue();
        }
    }

    fn heard(&mut self, told: Result<Told, JoinError>) -> Option<Outcome> {
        match told {
            Ok(told) => self.hear(told),
            Err(died) => {
                warn!(migration = %self.migration, error = %died, "a driver call died");
                self.comparing = false;
                self.rest(LONG_PAUSE);
                None
            }
        }
    }

    fn hear(&mut self, told: Told) -> Option<Outcome> {
        match told {
            // Nobody answers any more, and libvirt keeps the job of such a one for ever.
            Told::Sample(Ok(Job::Migration(sample)))
                if sample.post_copy_failed && self.transfer.is_none() =>
            {
                let message = "the post-copy failed: one half of the guest is left here".to_owned();
                return Some(Outcome::Failed { message });
            }
            Told::Sample(Ok(Job::Migration(sample))) => self.take_sample(&sample),
            Told::Sample(Ok(Job::None | Job::Other(_)) | Err(HypervisorError::NoSuchGuest(_))) => {
                if self.transfer.is_some() {
                    // Not begun yet, or over and about to say so.
                    self.rest(PAUSE.min(self.pause()));
                } else {
                    let (hypervisor, instance) = (self.node.hypervisor.clone(), self.instance);
                    self.asked
                        .spawn(async move { Told::Seen(hypervisor.presence(instance).await) });
                }
            }
            Told::Seen(Ok(presence)) => return self.see(presence),
            Told::Lasting(now) => self.compare(now),
            Told::Sample(Err(error)) | Told::Seen(Err(error)) => {
                self.miss(&error);
                self.shown
                    .set_note(format!("waiting for this node's libvirt: {error}"));
                self.voice.show(self.shown.progress());
                self.rest(LONG_PAUSE);
            }
            Told::Acted(act, result, lasting) => self.acted(act, &result, lasting),
        }
        None
    }

    /// Nothing is heard of the transfer. That is given up as well, after as long
    /// as one that makes no progress: a QEMU that waits for a dead peer answers nobody.
    fn miss(&mut self, error: &HypervisorError) {
        let patience = Duration::from_millis(self.policy.progress_timeout_ms());
        if self.told_at.elapsed() >= patience && self.wishes.intent().is_none() {
            let seconds = patience.as_secs();
            let why = format!("nothing was heard of it for {seconds} s: {error}");
            self.carry_out(Decision::GiveUp {
                why,
                of_guest: false,
            });
            self.pursue();
        }
    }

    fn rest(&mut self, pause: Duration) {
        self.looking = false;
        self.next_look = Instant::now() + pause;
    }

    fn pause(&self) -> Duration {
        let first = FIRST_PAUSES_MS.get(self.samples + 1);
        first.map_or(PAUSE, |ms| Duration::from_millis(*ms))
    }

    fn take_sample(&mut self, sample: &JobSample) {
        self.sightings = 0;
        self.told_at = Instant::now();
        let pause = self.pause();
        self.samples += 1;
        self.rest(pause);
        self.post_copy |= sample.post_copy;
        let judgement = self.policy.judge(self.policy_ms(), sample);
        self.shown.take_in(
            sample,
            Circumstances {
                elapsed_ms: self.elapsed_ms(),
                allowed_downtime_ms: self.policy.allowed_downtime_ms(),
                converging: judgement.converging,
                patience_ms: self.policy.patience_ms(self.policy_ms(), sample),
                note: judgement.note,
                paused: self.wishes.is_paused(),
            },
        );
        if let Some(decision) = judgement.decision {
            self.carry_out(decision);
        }
        self.pursue();
        self.voice.show(self.shown.progress());
    }

    /// No job, and the guest is seen so.
    fn see(&mut self, presence: Presence) -> Option<Outcome> {
        self.rest(LONG_PAUSE);
        self.sightings += 1;
        let certain = !presence.is_active() || self.sightings >= SIGHTINGS;
        certain.then(|| outcome::from_presence(presence, self.wishes.intent()))
    }

    fn notice(&mut self, event: Event) {
        let soon = match event {
            Event::SwitchOver(id) if id == self.instance => {
                self.switches_over();
                return;
            }
            Event::MigrationIteration(id) if id == self.instance => SHORT_PAUSE,
            // While migrate() runs, it tells the end sooner and for certain.
            Event::JobCompleted(id) | Event::Guest(id)
                if id == self.instance && self.transfer.is_none() =>
            {
                Duration::ZERO
            }
            // Somebody may have defined it anew.
            Event::Guest(id) if id == self.instance && self.may_turn_back() => SHORT_PAUSE,
            _ => return,
        };
        self.next_look = self.next_look.min(Instant::now() + soon);
    }

    /// The guest was stopped. A pause and post-copy stop it with much left to send,
    /// and are told by samples.
    fn switches_over(&mut self) {
        if !self.wishes.is_forced() && !self.record.request.options.post_copy {
            self.shown.switch_over();
            self.voice.show(self.shown.progress());
        }
    }

    fn carry_out(&mut self, decision: Decision) {
        match decision {
            Decision::RaiseDowntime { to_ms, why } => {
                self.decide(format!("allowed downtime raised to {to_ms} ms: {why}"));
                self.act(Act::SetDowntime(to_ms));
            }
            Decision::SwitchToPostCopy { why } => {
                self.decide(format!("switching to post-copy: {why}"));
                self.wishes.force(Force::PostCopy);
            }
            Decision::GiveUp { why, of_guest } => {
                self.decide(format!("given up: {why}"));
                self.wishes.give_up(why, of_guest);
            }
        }
    }

    pub(super) fn decide(&mut self, text: String) {
        info!(migration = %self.migration, instance = %self.instance, "{text}");
        self.voice.decided(text.clone());
        let decisions = &mut self.record.decisions;
        if decisions.len() >= MAX_DECISIONS {
            decisions.remove(0);
        }
        let at_ms = self.node.now_ms();
        decisions.push(Note { at_ms, text });
    }

    fn finish(mut self, outcome: Outcome) -> SourceRecord {
        let moved = matches!(outcome, Outcome::Moved { .. });
        let elapsed_ms = self.elapsed_ms();
        let shown = std::mem::replace(&mut self.shown, Shown::new(0));
        let ended = Ended {
            outcome,
            progress: shown.end(elapsed_ms, moved),
        };
        // The journal follows, for what it would say is found again by looking.
        self.voice.end(&ended);
        self.node.counters.count_outcome(&ended.outcome);
        info!(migration = %self.migration, instance = %self.instance, outcome = ?ended.outcome,
            elapsed_ms, "transfer over");
        self.orders.close();
        while let Ok(order) = self.orders.try_recv() {
            order.answer(Ok(()));
        }
        self.wishes.answer_all();
        self.record.ended = Some(ended);
        self.record
    }
}

impl From<Ended> for JobState {
    fn from(ended: Ended) -> Self {
        Self::Ended {
            outcome: ended.outcome,
            progress: Box::new(ended.progress),
        }
    }
}

/// What a transfer may do, by its options and the node's settings.
pub(super) fn limits(node: &Node, record: &SourceRecord) -> Limits {
    let (settings, options) = (&node.settings, &record.request.options);
    let timeout_s = options
        .progress_timeout_s
        .unwrap_or(settings.progress_timeout_s);
    Limits {
        max_downtime_ms: options.max_downtime_ms.unwrap_or(settings.max_downtime_ms),
        progress_timeout_ms: timeout_s.saturating_mul(1000),
        post_copy: options.post_copy,
    }
}
