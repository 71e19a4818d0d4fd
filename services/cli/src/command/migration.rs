//! `drover migration`: what moves and what moved, following it, steering it.

use drover_model::{
    api::conductor::{ListMigrations, method},
    migration::{self, Migration, MigrationStatus},
};

use super::{
    Session, deadline,
    follow::{self, Goal},
    would,
};
use crate::{
    args::{MigrationVerb, Steer},
    exit::{Exit, Trouble},
    render::{describe, meter::Meter, table},
};

/// Runs a verb.
pub async fn run(session: &mut Session, verb: MigrationVerb) -> Result<Exit, Trouble> {
    match verb {
        MigrationVerb::List {
            instance,
            host,
            active,
            limit,
        } => {
            let which = ListMigrations {
                instance,
                host,
                active,
                limit,
            };
            let migrations = session.client.list_migrations(&which).await?;
            session
                .screen
                .value(&migrations, |m| m.below(table::migrations(m.known())))?;
            Ok(Exit::Done)
        }
        MigrationVerb::Show { id } => {
            let migration = session.client.get_migration(&id).await?;
            session.screen.value(&migration, describe::migration)?;
            Ok(Exit::Done)
        }
        MigrationVerb::Watch { id, patience } => {
            let deadline = deadline(patience);
            let first = session.client.get_migration(&id).await?;
            let goal = Goal::of_onlooker(&first);
            follow::run(session, first, Meter::streaming(), deadline, goal).await
        }
        MigrationVerb::Abort(order) => steer(session, &ABORT, order).await,
        MigrationVerb::ForceComplete(order) => steer(session, &FORCE_COMPLETE, order).await,
        MigrationVerb::Resume(order) => steer(session, &RESUME, order).await,
    }
}

/// A way to steer a migration.
struct Way {
    method: &'static str,
    goal: Goal,
    /// What it does, for a dry run.
    would: &'static str,
    /// Whether it can be done with that one.
    fits: fn(&Migration) -> bool,
}

const ABORT: Way = Way {
    method: method::ABORT_MIGRATION,
    goal: Goal::Aborted,
    would: "would be aborted; the guest would stay where it is",
    fits: |m| {
        let may = m.status.may_become(MigrationStatus::Cancelled);
        may && !m.status.is_final() && m.ending.is_none()
    },
};
const FORCE_COMPLETE: Way = Way {
    method: method::FORCE_COMPLETE_MIGRATION,
    goal: Goal::Moved,
    would: "would be made to complete, by post-copy if its options allow that, \
            else by pausing the guest until it has moved",
    fits: |m| {
        let is_transfer = matches!(m.way, migration::Way::Transfer(_));
        m.status == MigrationStatus::Running && !is_transfer
    },
};
const RESUME: Way = Way {
    method: method::RESUME_MIGRATION,
    goal: Goal::Resumed,
    would: "would be taken up again at its step",
    fits: |m| m.status == MigrationStatus::Stuck,
};

async fn steer(session: &mut Session, way: &Way, order: Steer) -> Result<Exit, Trouble> {
    if order.change.dry_run {
        let migration = session.client.get_migration(&order.id).await?;
        return dry_run(session, way, &migration);
    }
    let deadline = deadline(order.patience);
    let record = session.client.steer(way.method, &order.id).await?;
    let goal = way.goal.of(&record);
    follow::go_on(session, record, order.change, deadline, goal).await
}

fn dry_run(session: &mut Session, way: &Way, m: &Migration) -> Result<Exit, Trouble> {
    if !(way.fits)(m) {
        let subject = describe::subject(m);
        let message = format!("{subject} is {}: that cannot be done with it", m.status);
        return Err(Trouble::new(Exit::Refused, message));
    }
    would(session, m, way.would)
}
