//! `drover instance`: what instances there are, and moving them.

use std::time::Duration;

use drover_model::{
    api::conductor::{ListInstances, MigrateAnswer, MigrateInstance, Plan},
    error::ErrorClass,
    migration::MigrationType,
};
use tokio::time::Instant;

use super::{
    Session,
    follow::{self, Goal},
};
use crate::{
    args::{InstanceVerb, Migrate, Patience},
    client::ADMISSION,
    exit::{Exit, Trouble},
    render::{clean, describe, meter::Meter, table},
};

/// Runs a verb.
pub async fn run(session: &mut Session, verb: InstanceVerb) -> Result<Exit, Trouble> {
    match verb {
        InstanceVerb::List { host, project } => {
            let which = ListInstances { host, project };
            let instances = session.client.list_instances(&which).await?;
            session
                .screen
                .value(&instances, |instances| table::instances(instances))?;
            Ok(Exit::Done)
        }
        InstanceVerb::Show { id } => {
            let instance = session.client.get_instance(&id).await?;
            session.screen.value(&instance, describe::instance)?;
            Ok(Exit::Done)
        }
        InstanceVerb::Migrate(order) => migrate(session, *order).await,
    }
}

async fn migrate(session: &mut Session, order: Migrate) -> Result<Exit, Trouble> {
    let options = order.how.options();
    if let Some(problem) = options.problems().first() {
        return Err(Trouble::usage(problem.clone()).remedy("`drover instance migrate --help`"));
    }
    let request = MigrateInstance {
        instance: order.id,
        migration_type: MigrationType::LiveMigration,
        host: order.to,
        options,
        dry_run: order.change.dry_run,
    };
    let deadline = deadline(order.patience);
    let answer = ask(session, &request, deadline).await?;
    match answer {
        MigrateAnswer::Plan { plan } => show_plan(session, &plan),
        MigrateAnswer::Accepted { migration } if order.change.no_wait => {
            follow::accepted(session, &migration)?;
            Ok(Exit::Done)
        }
        MigrateAnswer::Accepted { migration } => {
            follow::run(session, *migration, Meter::new(), deadline, Goal::Moved).await
        }
    }
}

/// When waiting ends.
pub(super) fn deadline(patience: Patience) -> Option<Instant> {
    let seconds = patience.timeout?;
    Instant::now().checked_add(Duration::from_secs(seconds))
}

async fn ask(
    session: &mut Session,
    request: &MigrateInstance,
    deadline: Option<Instant>,
) -> Result<MigrateAnswer, Trouble> {
    let left = deadline.map_or(ADMISSION, |at| at.duration_since(Instant::now()));
    let asked = session.client.migrate(request, left.min(ADMISSION));
    let outcome = tokio::select! {
        biased;
        answer = asked => answer,
        () = &mut session.interrupt => {
            let message = "interrupted before the conductor answered";
            Err(Trouble::new(Exit::Interrupted, message).kind(ErrorClass::Lost))
        }
    };
    outcome.map_err(|trouble| match trouble.kind {
        ErrorClass::Lost if !request.dry_run => uncertain(trouble, request),
        _ => trouble,
    })
}

/// The request may have been taken: asking for it again blindly could be wrong.
fn uncertain(trouble: Trouble, request: &MigrateInstance) -> Trouble {
    let name = clean(&request.instance);
    let message = format!(
        "{}: the migration may or may not have begun",
        trouble.message
    );
    let look = format!("`drover migration list --instance {name} --active` tells whether it has");
    Trouble {
        message,
        remedy: Some(look),
        ..trouble
    }
}

fn show_plan(session: &mut Session, plan: &Plan) -> Result<Exit, Trouble> {
    session.screen.value(plan, describe::plan)?;
    Ok(if plan.failures.is_empty() {
        Exit::Done
    } else {
        Exit::Refused
    })
}
