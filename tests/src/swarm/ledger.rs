//! What must hold, seen in the fabric and in the record, apart from the code that
//! promises it.

use drover_compute::hypervisor::fake::Fabric;
use drover_model::{
    api::conductor::{ListMigrations, ListOperations},
    ids::InstanceId,
    migration::MigrationStatus,
};
use drover_store::Store;

use super::plan::{Ask, Event, Plan};

/// Whoever checks.
pub(super) struct Ledger {
    /// The truth.
    pub(super) fabric: Fabric,
    /// What is believed of it.
    pub(super) store: Store,
    /// The guests.
    pub(super) guests: Vec<InstanceId>,
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
        let mut left = self.under_way().await;
        left.extend(self.claims().await);
        for id in &self.guests {
            left.extend(self.record_of(*id).await);
        }
        if !plan.loses_journals() {
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

    async fn under_way(&self) -> Vec<String> {
        let all = ListMigrations::default();
        let migrations = self.store.migrations(&all, None).await;
        let migrations = migrations.expect("readable");
        let moving = migrations.iter().filter(|m| !m.status.rests()).map(|m| {
            let why = m.end_reason.as_ref().map(ToString::to_string);
            let (status, step) = (m.status, &m.step);
            format!(
                "migration {} of {} is {status} at {step}: {why:?} {:?}",
                m.id, m.instance_name, m.warnings
            )
        });
        let operations = self.store.operations(&ListOperations::default()).await;
        let operations = operations.expect("readable");
        let working = operations
            .iter()
            .filter(|o| !o.status.is_final())
            .map(|o| format!("operation {} is {:?}", o.id, o.status));
        moving.chain(working).collect()
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

    /// The record follows the guest.
    async fn record_of(&self, id: InstanceId) -> Option<String> {
        let row = self.store.find_instance(&id.to_string()).await.ok()?;
        let found = self.fabric.whereabouts(id);
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

    /// What must hold when all has come to rest: each guest is whole somewhere, and
    /// runs if nothing but Drover touched it.
    pub(super) fn at_rest(&self, plan: &Plan) -> Vec<String> {
        let mut wrong = Vec::new();
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

impl Plan {
    fn loses_journals(&self) -> bool {
        self.any(|event| matches!(event, Event::LoseJournal { .. }))
    }

    fn any(&self, what: impl Fn(&Event) -> bool) -> bool {
        self.events.iter().any(|planned| what(&planned.event))
    }

    /// Whether anybody but Drover may have started a guest, or ended it.
    fn touches(&self, number: usize) -> bool {
        self.any(|event| match event {
            Event::GuestStops { guest } | Event::GuestStarts { guest } => *guest == number,
            Event::Ask(Ask::Live {
                guest, post_copy, ..
            }) => *guest == number && *post_copy,
            Event::PowerCut { .. } => true,
            _ => false,
        })
    }
}
