//! `drover instance confirm` and `revert`: what a cold migration that has
//! finished leaves open. The source keeps its copy until one of them is asked for.

use drover_model::{
    api::conductor::{ListMigrations, RevertMigration, method},
    migration::{Migration, MigrationStatus},
};

use super::{
    Session, deadline,
    follow::{self, Goal},
    heard, left, uncertain, would,
};
use crate::{
    args::{Revert, Settle},
    client::{QUESTION, WAY_BACK},
    exit::{Exit, Trouble},
    render::{clean, describe, units::moment},
};

/// So many migrations are named where none can be settled.
const NAMED: usize = 5;

/// Has the source remove its copy.
pub async fn confirm(session: &mut Session, order: Settle) -> Result<Exit, Trouble> {
    let finished = finished(session, &order.id, "confirm").await?;
    if order.change.dry_run {
        return would(session, &finished, &would_confirm(&finished));
    }
    let deadline = deadline(order.patience);
    let uuid = finished.uuid.to_string();
    let asked = session.client.steer(method::CONFIRM_MIGRATION, &uuid);
    let answer = heard(&mut session.interrupt, asked).await;
    let record = answer.map_err(|trouble| uncertain(trouble, "confirming", &order.id))?;
    follow::go_on(session, record, order.change, deadline, Goal::Confirmed).await
}

/// Takes the guest back.
pub async fn revert(session: &mut Session, order: Revert) -> Result<Exit, Trouble> {
    let Revert {
        settle,
        keep_changes,
        yes,
    } = order;
    let consented = keep_changes || yes || settle.change.dry_run;
    if !consented && session.answers.is_none() {
        return Err(nobody_to_ask());
    }
    let finished = finished(session, &settle.id, "revert").await?;
    if settle.change.dry_run {
        return would(session, &finished, &would_revert(&finished, keep_changes));
    }
    if !consented {
        consent(session, &finished).await?;
    }
    let deadline = deadline(settle.patience);
    let request = RevertMigration {
        migration: finished.uuid.to_string(),
        keep_changes,
    };
    // With the changes kept it is another migration that takes the guest back.
    let (goal, most) = if keep_changes {
        (Goal::Moved, WAY_BACK)
    } else {
        (Goal::Reverted, QUESTION)
    };
    let asked = session.client.revert(&request, left(deadline, most));
    let answer = heard(&mut session.interrupt, asked).await;
    let record = answer.map_err(|trouble| uncertain(trouble, "reverting", &settle.id))?;
    follow::go_on(session, record, settle.change, deadline, goal).await
}

/// The newest migration of an instance that can be settled.
async fn finished(session: &Session, id: &str, verb: &str) -> Result<Migration, Trouble> {
    let which = ListMigrations {
        instance: Some(id.to_owned()),
        limit: Some(1000),
        ..ListMigrations::default()
    };
    let all = session.client.list_migrations(&which).await?.into_known();
    let newest = all
        .iter()
        .find(|m| m.status == MigrationStatus::Finished)
        .cloned();
    newest.ok_or_else(|| nothing(id, verb, &all))
}

fn nothing(id: &str, verb: &str, all: &[Migration]) -> Trouble {
    let message = format!("nothing to {verb}: {}", history(id, all));
    let trouble = Trouble::new(Exit::Refused, message);
    let under_way = all.iter().find(|m| !m.status.rests());
    match under_way {
        None => trouble,
        Some(m) if m.status == MigrationStatus::Stuck => trouble.remedy(format!(
            "`drover migration show {0}`, mend it, `drover migration resume {0}`",
            m.id
        )),
        Some(m) => trouble.remedy(format!("`drover migration watch {}` follows it", m.id)),
    }
}

fn history(id: &str, all: &[Migration]) -> String {
    let id = clean(id);
    if all.is_empty() {
        return format!("{id} was never migrated");
    }
    let named = all.iter().take(NAMED).map(|m| {
        let kind = describe::kind(m);
        format!("{} ({kind}, {})", m.id, m.status)
    });
    let named = named.collect::<Vec<_>>().join(", ");
    let older = match all.len().saturating_sub(NAMED) {
        0 => String::new(),
        n => format!(", and {n} older"),
    };
    format!("no migration of {id} is finished; there are {named}{older}")
}

fn nobody_to_ask() -> Trouble {
    let message = "what the guest wrote since it moved would be lost, unless its disks are \
                   shared, and there is no terminal to ask on";
    Trouble::usage(message)
        .remedy("give --yes if it may be lost, or --keep-changes to take it along")
}

/// Asks whether what would be lost may be lost.
async fn consent(session: &mut Session, m: &Migration) -> Result<(), Trouble> {
    let question = format!(
        "what {} wrote on {} since {} is lost, unless its disks are shared; \
         its disks go back to what they were on {}. Go on? [y/N] ",
        clean(&m.instance_name),
        describe::destination(m),
        since(m),
        m.source_host
    );
    let answer = session.ask(&question).await?;
    if matches!(answer.trim().to_lowercase().as_str(), "y" | "yes") {
        return Ok(());
    }
    Err(Trouble::new(Exit::Failed, "not reverted: nothing was done"))
}

/// Since when the guest is where it was brought.
fn since(m: &Migration) -> String {
    moment(m.finished_at_ms.unwrap_or(m.updated_at_ms))
}

fn would_confirm(m: &Migration) -> String {
    format!(
        "would be confirmed: {} would remove its copy, and nothing would lead back",
        m.source_host
    )
}

fn would_revert(m: &Migration, keep_changes: bool) -> String {
    let (name, from, to) = (
        clean(&m.instance_name),
        describe::destination(m),
        &m.source_host,
    );
    if keep_changes {
        return format!(
            "would be confirmed, and {name} would be migrated back cold from {from} to {to} \
             with all that it wrote"
        );
    }
    format!(
        "would be reverted: {name} would be stopped on {from} and be on {to} again as it left; \
         what it wrote since {} would be lost, unless its disks are shared",
        since(m)
    )
}
