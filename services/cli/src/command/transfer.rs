//! `drover instance transfer` and `drover transfer`: giving an instance to
//! another project, for both sides at once or by an offer that is accepted.

use drover_model::{
    api::conductor::{
        AcceptTransfer, ListOffers, MigrateAnswer, OfferState, OfferTransfer, TransferInstance,
    },
    migration::TransferOptions,
};
use tokio::time::Instant;

use super::{
    Session, deadline,
    follow::{self, Goal},
    heard, left, perhaps, show_plan, uncertain,
};
use crate::{
    args::{
        Change,
        transfer::{self as order, Accept, Handover, TransferVerb},
    },
    client::ADMISSION,
    exit::{Exit, Trouble},
    render::{clean, describe, offer},
};

/// Runs a verb of offers.
pub async fn run(session: &mut Session, verb: TransferVerb) -> Result<Exit, Trouble> {
    match verb {
        TransferVerb::Offer(order) => make(session, order).await,
        TransferVerb::Accept(order) => accept(session, *order).await,
        TransferVerb::List { project, all } => {
            let which = ListOffers { project, all };
            let offers = session.client.list_offers(&which).await?;
            session
                .screen
                .value(&offers, |offers| offer::table(offers))?;
            Ok(Exit::Done)
        }
        TransferVerb::Show { offer } => {
            let offer = session.client.get_offer(&offer).await?;
            session.screen.value(&offer, offer::whole)?;
            Ok(Exit::Done)
        }
        TransferVerb::Withdraw { offer, change } => withdraw(session, &offer, change).await,
    }
}

/// Gives an instance to another project, for both sides.
pub async fn instance(
    session: &mut Session,
    order: order::TransferInstance,
) -> Result<Exit, Trouble> {
    let request = TransferInstance {
        options: options(&order.how, "instance transfer")?,
        instance: order.id,
        project: order.project,
        dry_run: order.change.dry_run,
    };
    let deadline = deadline(order.patience);
    let asked = session.client.transfer(&request, left(deadline, ADMISSION));
    let answer = heard(&mut session.interrupt, asked).await;
    let answer = answer.map_err(|trouble| match request.dry_run {
        true => trouble,
        false => uncertain(trouble, "the transfer", &request.instance),
    })?;
    go_on(session, answer, order.change, deadline, &request.project).await
}

async fn accept(session: &mut Session, order: Accept) -> Result<Exit, Trouble> {
    let options = options(&order.how, "transfer accept")?;
    let key = match order.key {
        Some(key) => key,
        None => key(session).await?,
    };
    let request = AcceptTransfer {
        offer: order.offer,
        key,
        project: order.project,
        options,
        dry_run: order.change.dry_run,
    };
    let deadline = deadline(order.patience);
    let asked = session.client.accept(&request, left(deadline, ADMISSION));
    let answer = heard(&mut session.interrupt, asked).await;
    let answer = answer.map_err(|trouble| match request.dry_run {
        true => trouble,
        false => {
            let look = format!(
                "`drover transfer show {}` tells whether it has",
                clean(&request.offer)
            );
            perhaps(trouble, "the transfer may or may not have begun", look)
        }
    })?;
    go_on(session, answer, order.change, deadline, &request.project).await
}

fn options(how: &Handover, verb: &str) -> Result<TransferOptions, Trouble> {
    let usage = |words: String| Trouble::usage(words).remedy(format!("`drover {verb} --help`"));
    how.options().map_err(usage)
}

async fn key(session: &mut Session) -> Result<String, Trouble> {
    let nobody = Trouble::usage("there is no key, and no terminal to ask for it on")
        .remedy("give it on standard input, or with --key");
    let typed = session.secret("key of the offer: ", nobody).await?;
    match typed.trim() {
        "" => Err(Trouble::usage("no key was given: nothing was done")),
        key => Ok(key.to_owned()),
    }
}

async fn go_on(
    session: &mut Session,
    answer: MigrateAnswer,
    change: Change,
    deadline: Option<Instant>,
    project: &str,
) -> Result<Exit, Trouble> {
    match answer {
        MigrateAnswer::Plan { plan } => show_plan(session, &plan, |plan| {
            describe::transfer_plan(plan, project)
        }),
        MigrateAnswer::Accepted { migration } => {
            follow::go_on(session, *migration, change, deadline, Goal::Moved).await
        }
    }
}

/// The conductor answers when it is done: there is nothing to wait for.
async fn make(session: &mut Session, order: order::Offer) -> Result<Exit, Trouble> {
    if order.change.dry_run {
        return would_offer(session, &order).await;
    }
    let request = OfferTransfer {
        instance: order.id,
        project: order.project,
        expires_in_s: order.expires,
    };
    let asked = session.client.offer(&request);
    let answer = heard(&mut session.interrupt, asked).await;
    let made = answer.map_err(|trouble| {
        let look = "`drover transfer list` shows it if it was; its key is lost, so take it back \
                    with `drover transfer withdraw` and offer again";
        perhaps(trouble, "the offer may have been made", look.to_owned())
    })?;
    session.screen.value(&made, offer::made)?;
    Ok(Exit::Done)
}

async fn would_offer(session: &mut Session, order: &order::Offer) -> Result<Exit, Trouble> {
    let instance = session.client.get_instance(&order.id).await?;
    let to = match &order.project {
        Some(project) => {
            let view = session.client.get_project(project).await?;
            format!("project {}", clean(view.project.id.as_str()))
        }
        None => offer::ANYBODY.to_owned(),
    };
    session.screen.value(&instance, |i| {
        let (name, giver) = (clean(&i.name), clean(&i.project_id));
        format!(
            "{name} ({}) of project {giver} would be offered to {to}",
            i.uuid
        )
    })?;
    Ok(Exit::Done)
}

async fn withdraw(session: &mut Session, id: &str, change: Change) -> Result<Exit, Trouble> {
    if !change.dry_run {
        let withdrawn = session.client.withdraw(id).await?;
        session.screen.value(&withdrawn, offer::line)?;
        return Ok(Exit::Done);
    }
    let there = session.client.get_offer(id).await?;
    if there.state != OfferState::Open {
        let message = format!("{}: it cannot be withdrawn", offer::line(&there));
        return Err(Trouble::new(Exit::Refused, message));
    }
    session.screen.value(&there, |there| {
        format!("{}; it would be withdrawn", offer::line(there))
    })?;
    Ok(Exit::Done)
}
