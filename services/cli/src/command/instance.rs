//! `drover instance`: what instances there are, and moving them. Settling what
//! a cold move left open is in [`settle`].

use drover_model::{
    api::conductor::{ForgetInstance, ListInstances, MigrateAnswer, MigrateInstance},
    migration::Flavor,
};
use tokio::time::Instant;

use super::{
    Session, deadline,
    follow::{self, Goal},
    heard, left, settle, show_plan, transfer, uncertain,
};
use crate::{
    args::{InstanceVerb, Migrate},
    client::ADMISSION,
    exit::{Exit, Trouble},
    render::{describe, table},
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
        InstanceVerb::Definition { id } => {
            let kept = session.client.get_kept_definition(&id).await?;
            session.screen.value(&kept, |kept| kept.domain.clone())?;
            if kept.has_secrets {
                let words = "it has secrets, which are not told: put them in before it is used";
                session.screen.notice(words);
            }
            Ok(Exit::Done)
        }
        InstanceVerb::Forget { id, change } => forget(session, id, change.dry_run).await,
        InstanceVerb::Migrate(order) => migrate(session, *order).await,
        InstanceVerb::Confirm(order) => settle::confirm(session, order).await,
        InstanceVerb::Revert(order) => settle::revert(session, order).await,
        InstanceVerb::Transfer(order) => transfer::instance(session, *order).await,
    }
}

async fn forget(session: &mut Session, id: String, dry_run: bool) -> Result<Exit, Trouble> {
    let instance = session.client.get_instance(&id).await?;
    let request = ForgetInstance {
        instance: instance.uuid.to_string(),
        dry_run,
    };
    session.client.forget_instance(&request).await?;
    session.screen.value(&instance, |instance| match dry_run {
        true => format!("{} would be forgotten", instance.name),
        false => format!("{} is forgotten", instance.name),
    })?;
    Ok(Exit::Done)
}

async fn migrate(session: &mut Session, order: Migrate) -> Result<Exit, Trouble> {
    let flavor = flavor(session, &order).await?;
    let way = order.way(flavor);
    if let Some(problem) = way.problems().first() {
        return Err(Trouble::usage(problem.clone()).remedy("`drover instance migrate --help`"));
    }
    let request = MigrateInstance {
        dry_run: order.change.dry_run,
        ..MigrateInstance::new(order.id, order.to, &way)
    };
    let deadline = deadline(order.patience);
    match ask(session, &request, deadline).await? {
        MigrateAnswer::Plan { plan } => show_plan(session, &plan, describe::plan),
        MigrateAnswer::Accepted { migration } => {
            follow::go_on(session, *migration, order.change, deadline, Goal::Moved).await
        }
    }
}

/// The new size, if one is wished; what of it is not named stays as it is.
async fn flavor(session: &Session, order: &Migrate) -> Result<Option<Flavor>, Trouble> {
    let (vcpus, memory_mb) = match (order.cold.vcpus, order.cold.memory_mib) {
        (None, None) => return Ok(None),
        (Some(vcpus), Some(memory_mb)) => (vcpus, memory_mb),
        (vcpus, memory_mb) => {
            let now = session.client.get_instance(&order.id).await?;
            (
                vcpus.unwrap_or(now.vcpus),
                memory_mb.unwrap_or(now.memory_mb),
            )
        }
    };
    Ok(Some(Flavor { vcpus, memory_mb }))
}

async fn ask(
    session: &mut Session,
    request: &MigrateInstance,
    deadline: Option<Instant>,
) -> Result<MigrateAnswer, Trouble> {
    let asked = session.client.migrate(request, left(deadline, ADMISSION));
    let answer = heard(&mut session.interrupt, asked).await;
    answer.map_err(|trouble| match request.dry_run {
        true => trouble,
        false => uncertain(trouble, "the migration", &request.instance),
    })
}
