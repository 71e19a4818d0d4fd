//! What is wanted of a transfer beyond its going on, and how that is brought
//! about. What is not possible yet is no refusal: it is kept as a wish and
//! tried again with every sample.
//!
//! ```text
//! abort / give up / spare:
//!                   wished ─► asked of libvirt ─► taken ─► the transfer's end says so
//!                     ▲            └─ no job yet ─┐   └─ no end for long: its streams are cut
//!                     └──────── next sample ──────┘
//! force-complete:   the same, once memory flows; post-copy if allowed, else a pause
//! ```

use drover_model::{api::fault::Fault, migration::Phase};
use tokio::time::Instant;
use tracing::warn;

use super::{
    monitor::{LET_GO, Monitor, Told},
    outcome::Intent,
    steps::Reply,
};
use crate::{faults, hypervisor::HypervisorError, journal::Record};

/// Something the conductor wants of a transfer.
pub(super) enum Order {
    /// Stop it.
    Abort(Reply<()>),
    /// Bring it to its end at once.
    ForceComplete(Reply<()>),
}

impl Order {
    pub(super) fn answer(self, answer: Result<(), Fault>) {
        let (Self::Abort(reply) | Self::ForceComplete(reply)) = self;
        // Whoever asked may have gone; the deed does not depend on it.
        drop(reply.send(answer));
    }
}

/// A way to end a transfer quickly.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Force {
    PostCopy,
    Pause,
}

/// Something asked of the hypervisor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Act {
    Abort,
    Sever,
    Force(Force),
    SetDowntime(u64),
}

/// What is wanted, and how far it has come.
#[derive(Default)]
pub(super) struct Wishes {
    intent: Option<Intent>,
    abort_asked: bool,
    force: Option<Force>,
    force_asked: bool,
    paused: bool,
    waiting: Vec<(Act, Order)>,
}

impl Wishes {
    /// Why the transfer is being ended, if it is.
    pub(super) fn intent(&self) -> Option<&Intent> {
        self.intent.as_ref()
    }

    /// Whether a force-complete has paused the guest.
    pub(super) fn is_paused(&self) -> bool {
        self.paused
    }

    /// Whether it is to be ended by force, or is being so.
    pub(super) fn is_forced(&self) -> bool {
        self.force.is_some() || self.paused
    }

    pub(super) fn force(&mut self, force: Force) {
        self.force.get_or_insert(force);
    }

    pub(super) fn give_up(&mut self, why: String, of_guest: bool) {
        self.intent.get_or_insert(Intent::GiveUp { why, of_guest });
    }

    pub(super) fn spare(&mut self, why: String) {
        self.intent.get_or_insert(Intent::Spare { why });
    }

    fn answer(&mut self, act: Act, answer: &Result<(), Fault>) {
        for (_, order) in self.waiting.extract_if(.., |(wanted, _)| *wanted == act) {
            order.answer(answer.clone());
        }
    }

    /// The transfer is over: its outcome is the answer.
    pub(super) fn answer_all(&mut self) {
        for (_, order) in self.waiting.drain(..) {
            order.answer(Ok(()));
        }
    }
}

impl Monitor {
    /// Takes an order; it is answered when the hypervisor has.
    pub(super) fn obey(&mut self, order: Order) {
        match &order {
            Order::Abort(_) if self.post_copy => {
                let late = "the guest runs on the destination already; it is too late to abort";
                order.answer(Err(Fault::refused(late)));
            }
            Order::Abort(_) => {
                if self.wishes.intent.replace(Intent::Abort).is_none() {
                    self.decide("abort asked for".to_owned());
                }
                self.wishes.waiting.push((Act::Abort, order));
                self.pursue();
            }
            Order::ForceComplete(_) if self.wishes.intent.is_some() => {
                order.answer(Err(Fault::refused("the transfer is being aborted")));
            }
            Order::ForceComplete(_) if self.post_copy || self.wishes.paused => {
                order.answer(Ok(()));
            }
            Order::ForceComplete(_) => self.force_complete(order),
        }
    }

    fn force_complete(&mut self, order: Order) {
        let (force, text) = match self.record.request.options.post_copy {
            true => (
                Force::PostCopy,
                "force-complete asked for: switching to post-copy",
            ),
            false => (
                Force::Pause,
                "force-complete asked for: the guest is paused for the rest",
            ),
        };
        if self.wishes.force.replace(force).is_none() {
            self.decide(text.to_owned());
        }
        self.wishes.waiting.push((Act::Force(force), order));
        self.pursue();
        if !self.wishes.force_asked {
            self.wishes.answer(Act::Force(force), &Ok(()));
        }
    }

    /// Asks the hypervisor for what is wanted and has not been asked for.
    pub(super) fn pursue(&mut self) {
        if self.post_copy && self.wishes.intent.take().is_some() {
            self.decide("too late to stop it: the guest runs on the destination".to_owned());
        }
        if self.wishes.intent.is_some() {
            if !self.wishes.abort_asked {
                self.wishes.abort_asked = true;
                self.cut_at.get_or_insert_with(|| Instant::now() + LET_GO);
                self.act(Act::Abort);
            }
            return;
        }
        // While disks are copied a guest cannot run elsewhere, nor should it
        // stand still for so long.
        let memory_flows = self.shown.progress().phase >= Phase::Memory;
        let done = self.post_copy || self.wishes.paused;
        if let Some(force) = self.wishes.force
            && memory_flows
            && !done
            && !self.wishes.force_asked
        {
            self.wishes.force_asked = true;
            self.act(Act::Force(force));
        }
    }

    /// The transfer was to end and has not. Where the guest may have begun to run on
    /// the destination it is not cut off from what it left behind.
    pub(super) fn cut(&mut self) {
        self.cut_at = None;
        let memory = self.shown.progress().phase >= Phase::Memory;
        if self.post_copy || (self.record.request.options.post_copy && memory) {
            return;
        }
        let seconds = LET_GO.as_secs();
        self.decide(format!(
            "cut off from the destination: the transfer was not let go of for {seconds} s"
        ));
        self.act(Act::Sever);
    }

    /// Asks for one thing; the answer comes back to [`Self::acted`].
    pub(super) fn act(&mut self, act: Act) {
        if act == Act::Force(Force::Pause) {
            self.record.paused_by_force_complete = true;
        }
        let (node, id) = (self.node.clone(), self.instance);
        let (migration, record) = (self.migration, self.record.clone());
        self.asked.spawn(async move {
            let hypervisor = &node.hypervisor;
            let result = match act {
                Act::Abort => hypervisor.abort(id).await,
                Act::Sever => {
                    let address = &record.request.destination.address;
                    hypervisor.sever(id, address).await
                }
                Act::SetDowntime(ms) => hypervisor.set_max_downtime_ms(id, ms).await,
                Act::Force(Force::PostCopy) => hypervisor.start_post_copy(id).await,
                Act::Force(Force::Pause) => {
                    // Should the transfer fail, somebody must know that it was
                    // the agent who paused the guest (invariant 4).
                    let record = Record::Source(Box::new(record));
                    if let Err(e) = node.journal.migrations.store(migration, &record).await {
                        return Told::Acted(act, Err(e.into()), true);
                    }
                    hypervisor.pause_for_switch_over(id).await
                }
            };
            // Not possible *now* may be possible later, or too late; time tells.
            let lasting = !matches!(result, Err(HypervisorError::WrongState(_)));
            Told::Acted(act, result.map_err(faults::hypervisor), lasting)
        });
    }

    /// The hypervisor's answer; not `lasting` if the same may be possible later.
    pub(super) fn acted(&mut self, act: Act, result: &Result<(), Fault>, lasting: bool) {
        let answer = if lasting { result.clone() } else { Ok(()) };
        self.wishes.answer(act, &answer);
        match act {
            // One that was taken stays asked for until the transfer ends.
            Act::Abort => {
                self.wishes.abort_asked = result.is_ok();
                if !lasting {
                    self.cut_at = None;
                }
            }
            Act::Force(force) => {
                self.wishes.force_asked = false;
                self.wishes.paused |= result.is_ok() && force == Force::Pause;
                if lasting {
                    self.wishes.force = None;
                }
            }
            Act::SetDowntime(_) | Act::Sever => {}
        }
        if let (Err(fault), true) = (result, lasting) {
            warn!(migration = %self.migration, ?act, error = %fault, "libvirt did not do it");
        }
    }
}
