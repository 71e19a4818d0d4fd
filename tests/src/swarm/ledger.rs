//! What must hold, seen in the fabric and in the record, apart from the code that
//! promises it.

use drover_compute::hypervisor::fake::Fabric;
use drover_model::{
    api::conductor::{ListMigrations, ListOperations},
    ids::InstanceId,
    migration::{Migration, MigrationStatus},
    operation::OperationStatus,
};
use drover_store::Store;

use super::{
    fences::Switches,
    plan::{Ask, Event, Fence, Plan},
};

/// What a migration says one of whose nodes lost its journal.
const LEFT_UNKNOWN: &str = "knows nothing of it any more";
/// What one says that went back from a destination which may have run the guest.
const LEFT_AT_DEST: &str = "what came there is not removed";

/// Whoever checks.
pub(super) struct Ledger {
    /// The truth.
    pub(super) fabric: Fabric,
    /// What is believed of it.
    pub(super) store: Store,
    /// The guests.
    pub(super) guests: Vec<InstanceId>,
    /// What cuts power.
    pub(super) switches: Switches,
}

impl Ledger {
    /// What must hold at every moment: one running copy, with its memory, on its own
    /// disks, of which no byte is lost.
    pub(super) fn moment(fabric: &Fabric) -> Vec<String> {
        let broken = fabric.check_invariants().err().unwrap_or_default();
        let broken = broken.iter().map(ToString::to_string);
        broken.chain(fabric.lost_bytes()).collect()
    }

    /// What has not come to rest, in words: migrations and operations that are under
    /// way, claims of none, a record that says otherwise, things left behind.
    pub(super) async fn unrest(&self, plan: &Plan) -> Vec<String> {
        let mut left = Vec::new();
        let mut waiting = Vec::new();
        for m in self.under_way().await {
            // Where somebody else's hand was in it, nothing is done without people.
            match plan.is_moved_by_hand(self.number(m.instance_uuid)) && m.end_reason.is_some() {
                true => waiting.push(m.instance_uuid),
                false => left.push(in_words(&m)),
            }
        }
        left.extend(self.operations_under_way(&waiting).await);
        left.extend(self.claims().await);
        for id in self.guests.iter().filter(|id| !waiting.contains(id)) {
            let number = self.number(*id);
            left.extend(self.record_of(*id, plan, number).await);
        }
        if !plan.may_leave_things() && !self.says(None, LEFT_AT_DEST).await {
            left.extend(self.left_behind().await);
        }
        left
    }

    /// What belongs to nobody; a cold migration that may be reverted keeps its own.
    async fn left_behind(&self) -> Vec<String> {
        let all = ListMigrations::default();
        let migrations = self.store.migrations(&all, None).await;
        let migrations = migrations.expect("readable");
        let kept = migrations
            .iter()
            .filter(|m| m.status == MigrationStatus::Finished);
        let kept: Vec<String> = kept.map(|m| m.uuid.to_string()).collect();
        let mut left = self.fabric.leftovers();
        left.retain(|what| !kept.iter().any(|uuid| what.contains(uuid)));
        left
    }

    async fn under_way(&self) -> Vec<Migration> {
        let all = ListMigrations::default();
        let migrations = self.store.migrations(&all, None).await;
        let migrations = migrations.expect("readable").into_iter();
        migrations.filter(|m| !m.status.rests()).collect()
    }

    /// Operations that have not ended, and wait for no guest of those.
    async fn operations_under_way(&self, waiting: &[InstanceId]) -> Vec<String> {
        let operations = self.store.operations(&ListOperations::default()).await;
        let operations = operations.expect("readable");
        let working = operations
            .iter()
            .filter(|o| !o.status.is_final())
            .filter(|o| {
                !o.items
                    .iter()
                    .any(|i| waiting.contains(&i.planned.instance))
            })
            .map(|o| format!("operation {} is {:?}", o.id, o.status));
        working.collect()
    }

    fn number(&self, id: InstanceId) -> usize {
        let number = self.guests.iter().position(|guest| *guest == id);
        number.expect("it is one of them")
    }

    async fn claims(&self) -> Vec<String> {
        let claims = self.store.claims().await.expect("readable");
        let mut wrong = Vec::new();
        for (of, _) in claims {
            let id = of.parse().expect("a claim is a migration's");
            let m = self.store.migration(id).await.expect("on the record");
            if m.status != MigrationStatus::Finished && m.status.rests() {
                wrong.push(format!(
                    "migration {} ended as {} and claims",
                    m.id, m.status
                ));
            }
        }
        wrong
    }

    /// The record follows the guest. Of one that somebody took away while Drover moved
    /// it there may be two definitions, of which it names one. So there may of one whose
    /// source lost its journal, which the migration says.
    async fn record_of(&self, id: InstanceId, plan: &Plan, number: usize) -> Option<String> {
        let row = self.store.find_instance(&id.to_string()).await.ok()?;
        let mut found = self.fabric.whereabouts(id);
        if found.len() > 1 && self.says_what_is_left(id).await {
            found.retain(|(at, here)| *at == row.host || here.is_active());
        }
        if plan.is_moved_by_hand(number) && found.len() > 1 {
            let runs = found.iter().any(|(_, here)| here.is_active());
            found.retain(|(at, here)| here.is_active() || (!runs && *at == row.host));
        }
        let [(at, here)] = &found[..] else {
            return Some(format!("{} is at {found:?}", row.name));
        };
        let active = here.is_active();
        (row.host != *at || row.power_state.is_active() != active).then(|| {
            let (host, state) = (&row.host, row.power_state);
            format!(
                "{} is {here:?} on {at}; the record says {state:?} on {host}",
                row.name
            )
        })
    }

    /// Whether a migration says that a node has the guest's definition still.
    async fn says_what_is_left(&self, id: InstanceId) -> bool {
        self.says(Some(id), LEFT_UNKNOWN).await || self.says(Some(id), LEFT_AT_DEST).await
    }

    async fn says(&self, of: Option<InstanceId>, words: &str) -> bool {
        let migrations = self.store.migrations(&ListMigrations::default(), of).await;
        let migrations = migrations.expect("readable");
        let mut warnings = migrations.iter().flat_map(|m| &m.warnings);
        warnings.any(|warning| warning.contains(words))
    }

    /// What must hold when all has come to rest: each guest is whole somewhere, and
    /// runs if nothing but Drover touched it.
    pub(super) async fn at_rest(&self, plan: &Plan) -> Vec<String> {
        let mut wrong = self.unexplained().await;
        wrong.extend(self.switches.wrong());
        for (number, id) in self.guests.iter().enumerate() {
            let runs = self.fabric.running_on(*id).is_some();
            let should = plan.guests[number].runs;
            if runs != should && !plan.touches(number) {
                let whereabouts = self.fabric.whereabouts(*id);
                wrong.push(format!("guest{number} ran: {should}; now {whereabouts:?}"));
            }
            wrong.extend(self.fabric.incomplete(*id));
        }
        wrong
    }
}

fn in_words(m: &Migration) -> String {
    let why = m.end_reason.as_ref().map(ToString::to_string);
    let (status, step) = (m.status, &m.step);
    format!(
        "migration {} of {} is {status} at {step}: {why:?} {:?}",
        m.id, m.instance_name, m.warnings
    )
}

impl Ledger {
    /// What did not come to what was asked for, and does not say why.
    async fn unexplained(&self) -> Vec<String> {
        let all = ListMigrations::default();
        let migrations = self.store.migrations(&all, None).await;
        let migrations = migrations.expect("readable").into_iter();
        let silent =
            migrations.filter(|m| m.status == MigrationStatus::Failed && m.end_reason.is_none());
        let silent = silent.map(|m| format!("migration {} failed and does not say why", m.id));
        let operations = self.store.operations(&ListOperations::default()).await;
        let operations = operations.expect("readable").into_iter();
        let mute = operations.filter(|o| match o.status {
            OperationStatus::Failed => o.failure.is_none() && o.refusals.is_empty(),
            OperationStatus::Incomplete => o.items.is_empty() && o.decisions.is_empty(),
            _ => false,
        });
        let mute =
            mute.map(|o| format!("operation {} is {:?} and does not say why", o.id, o.status));
        silent.chain(mute).collect()
    }
}

impl Plan {
    /// A lost journal knows of no clean-up, one that cannot be written of no marks,
    /// and whoever moves a guest by hand leaves its disks where they were.
    fn may_leave_things(&self) -> bool {
        self.any(|event| {
            matches!(
                event,
                Event::LoseJournal { .. } | Event::FullState { .. } | Event::GuestMoves { .. }
            )
        })
    }

    fn is_moved_by_hand(&self, number: usize) -> bool {
        self.any(|event| matches!(event, Event::GuestMoves { guest, .. } if *guest == number))
    }

    fn any(&self, what: impl Fn(&Event) -> bool) -> bool {
        self.events.iter().any(|planned| what(&planned.event))
    }

    /// Whether anybody but Drover may have started a guest, or ended it.
    fn touches(&self, number: usize) -> bool {
        // Of a node that was dead by all signs the power may be cut.
        let may_be_cut = self.fence == Fence::Works;
        may_be_cut
            || self.any(|event| match event {
                Event::GuestStops { guest }
                | Event::GuestStarts { guest }
                | Event::GuestReboots { guest }
                | Event::GuestMoves { guest, .. } => *guest == number,
                Event::Ask(Ask::Live {
                    guest, post_copy, ..
                }) => *guest == number && *post_copy,
                Event::PowerCut { .. } => true,
                _ => false,
            })
    }
}
