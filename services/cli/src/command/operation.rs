//! `drover operation`: what is done and was done with nodes, following it,
//! calling it off.

use drover_model::{
    api::conductor::{ListOperations, OperationView},
    operation::OperationStatus,
};

use super::{
    Session, deadline, heard, perhaps,
    watch::{self, Goal},
};
use crate::{
    args::{Change, Patience, operation::OperationVerb},
    exit::{Exit, Trouble},
    render::{
        clean,
        operation::{self, board::Board},
    },
};

/// Runs a verb.
pub async fn run(session: &mut Session, verb: OperationVerb) -> Result<Exit, Trouble> {
    match verb {
        OperationVerb::List {
            host,
            kind,
            active,
            limit,
        } => {
            let which = ListOperations {
                host,
                kind: kind.map(|kind| kind.as_str().to_owned()),
                active,
                limit,
            };
            let operations = session.client.list_operations(&which).await?;
            session
                .screen
                .value(&operations, |o| o.below(operation::table(o.known())))?;
            Ok(Exit::Done)
        }
        OperationVerb::Show { id } => {
            let view = session.client.get_operation(&id).await?;
            session.screen.value(&view, operation::whole)?;
            Ok(Exit::Done)
        }
        OperationVerb::Watch { id, patience } => {
            let deadline = deadline(patience);
            let first = session.client.get_operation(&id).await?;
            watch::run(
                session,
                first,
                Board::streaming(),
                deadline,
                Goal::Completed,
            )
            .await
        }
        OperationVerb::Cancel {
            id,
            change,
            patience,
        } => cancel(session, &id, change, patience).await,
    }
}

async fn cancel(
    session: &mut Session,
    id: &str,
    change: Change,
    patience: Patience,
) -> Result<Exit, Trouble> {
    if change.dry_run {
        let view = session.client.get_operation(id).await?;
        return would_cancel(session, &view);
    }
    let deadline = deadline(patience);
    let asked = session.client.cancel_operation(id);
    let answer = heard(&mut session.interrupt, asked).await;
    let view = answer.map_err(|trouble| {
        let look = format!("`drover operation show {}` tells whether it is", clean(id));
        perhaps(trouble, "it may or may not be called off", look)
    })?;
    if change.no_wait {
        session
            .screen
            .value(&view, |view| view.operation.id.to_string())?;
        return Ok(Exit::Done);
    }
    watch::run(session, view, Board::new(), deadline, Goal::Cancelled).await
}

fn would_cancel(session: &mut Session, view: &OperationView) -> Result<Exit, Trouble> {
    let o = &view.operation;
    let noun = operation::noun(&o.task);
    if !o.status.may_become(OperationStatus::Cancelling) || o.status.is_final() {
        let message = format!("{noun} is {}: it cannot be called off", o.status);
        return Err(Trouble::new(Exit::Refused, message));
    }
    session.screen.value(view, |_| {
        format!(
            "{noun} ({}) would be called off: of its guests, {} would not begin and {} would be \
             called back; those that have moved stay where they are",
            o.status,
            o.count("waiting"),
            o.count("moving")
        )
    })?;
    Ok(Exit::Done)
}
