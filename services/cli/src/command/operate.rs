//! `drover node drain`, `restore`, `evacuate` and `balance`: asked for, or
//! planned and shown; and what the conductor does of that by itself.

use drover_model::{
    api::conductor::{
        Automation, BalanceNodes, DrainNode, EvacuateNode, OperationAnswer, OperationView,
        RestoreNode, SetAutomation, method,
    },
    ids::InstanceId,
    operation::Task,
};
use serde::Serialize;

use super::{
    Session, deadline, heard, left, perhaps,
    watch::{self, Goal},
};
use crate::{
    args::{
        Change, Patience,
        operation::{self as order, Balance, Drain, Evacuate, Restore},
    },
    client::ADMISSION,
    exit::{Exit, Trouble},
    render::{
        clean,
        describe::block,
        operation::{board::Board, evidence, noun, plan},
        outcome,
        screen::Manner,
    },
};

/// Empties a node.
pub async fn drain(session: &mut Session, order: Drain) -> Result<Exit, Trouble> {
    let usage = |words: String| Trouble::usage(words).remedy("`drover node drain --help`");
    let options = order.options().map_err(usage)?;
    let request = DrainNode {
        options: options.clone(),
        dry_run: order.change.dry_run,
    };
    let wish = Wish::new(
        method::DRAIN_NODE,
        Task::Drain(options),
        order.change,
        order.patience,
    );
    begin(session, &request, wish).await
}

/// Opens a node again, with what comes back to it.
pub async fn restore(session: &mut Session, order: Restore) -> Result<Exit, Trouble> {
    let options = order.options();
    let request = RestoreNode {
        options: options.clone(),
        dry_run: order.change.dry_run,
    };
    let task = Task::Restore(options);
    let wish = Wish::new(method::RESTORE_NODE, task, order.change, order.patience);
    begin(session, &request, wish).await
}

/// Starts elsewhere what ran on a dead node.
pub async fn evacuate(session: &mut Session, order: Evacuate) -> Result<Exit, Trouble> {
    let only = named(session, &order.only).await?;
    let options = order.options(only);
    let request = EvacuateNode {
        options: options.clone(),
        dry_run: order.change.dry_run,
    };
    if !request.dry_run && !is_accepted(session, &request).await? {
        return Ok(Exit::Refused);
    }
    let task = Task::Evacuate(options);
    let wish = Wish::new(method::EVACUATE_NODE, task, order.change, order.patience);
    begin(session, &request, wish).await
}

/// Shows the evidence before anything is asked for, and says whether it allows it.
/// JSON tells the operation alone; a conductor that cannot be asked judges by
/// itself.
async fn is_accepted(session: &mut Session, request: &EvacuateNode) -> Result<bool, Trouble> {
    if session.screen.manner() == Manner::Json {
        return Ok(true);
    }
    let asked = session.client.get_evidence(request);
    let seen = match heard(&mut session.interrupt, asked).await {
        Ok(seen) => seen,
        Err(trouble) if trouble.class.is_some() => return Ok(true),
        Err(trouble) => return Err(trouble),
    };
    let evidence = block("evidence", evidence::lines(&seen.evidence));
    session.screen.notice(&evidence);
    if !seen.failures.is_empty() {
        let refused = block("what stands in the way", outcome::failures(&seen.failures));
        session.screen.notice(&refused);
        let host = &request.options.host;
        session
            .screen
            .notice(&format!("{host} is not evacuated: nothing was done"));
    }
    Ok(seen.failures.is_empty())
}

/// Spreads load.
pub async fn balance(session: &mut Session, order: Balance) -> Result<Exit, Trouble> {
    let options = order.options();
    let request = BalanceNodes {
        options: options.clone(),
        dry_run: order.change.dry_run,
    };
    let task = Task::Balance(options);
    let wish = Wish::new(method::BALANCE_NODES, task, order.change, order.patience);
    begin(session, &request, wish).await
}

/// Instances by what names them.
async fn named(session: &Session, names: &[String]) -> Result<Vec<InstanceId>, Trouble> {
    let mut uuids = Vec::new();
    for name in names {
        uuids.push(session.client.get_instance(name).await?.uuid);
    }
    Ok(uuids)
}

/// An operation that is asked for.
struct Wish {
    method: &'static str,
    task: Task,
    change: Change,
    patience: Patience,
}

impl Wish {
    fn new(method: &'static str, task: Task, change: Change, patience: Patience) -> Self {
        Self {
            method,
            task,
            change,
            patience,
        }
    }

    /// A request whose answer was lost may have been taken.
    fn uncertain(&self, trouble: Trouble) -> Trouble {
        if self.change.dry_run {
            return trouble;
        }
        let host = self.task.host();
        let host = host.map_or_else(String::new, |host| format!(" --host {host}"));
        let look = format!("`drover operation list --active{host}` tells whether it has");
        let what = format!("{} may or may not have begun", noun(&self.task));
        perhaps(trouble, &what, look)
    }
}

async fn begin(
    session: &mut Session,
    request: &(impl Serialize + Sync),
    wish: Wish,
) -> Result<Exit, Trouble> {
    let deadline = deadline(wish.patience);
    let client = &session.client;
    let asked = client.operate(wish.method, request, left(deadline, ADMISSION));
    let answer = heard(&mut session.interrupt, asked).await;
    let answer = answer.map_err(|trouble| wish.uncertain(trouble))?;
    match answer {
        OperationAnswer::Plan { .. } => show_plan(session, &answer, &wish.task),
        OperationAnswer::Accepted { operation } if wish.change.no_wait => {
            session.screen.value(&*operation, |o| o.id.to_string())?;
            if session.screen.manner() == Manner::Terminal {
                session
                    .screen
                    .notice(&watch::goes_on("accepted", &operation));
            }
            Ok(Exit::Done)
        }
        OperationAnswer::Accepted { operation } => {
            let first = OperationView {
                operation: *operation,
                migrations: Vec::new(),
            };
            watch::run(session, first, Board::new(), deadline, Goal::Completed).await
        }
    }
}

fn show_plan(
    session: &mut Session,
    answer: &OperationAnswer,
    task: &Task,
) -> Result<Exit, Trouble> {
    let OperationAnswer::Plan {
        plan,
        failures,
        evidence,
    } = answer
    else {
        return Ok(Exit::Failed);
    };
    session.screen.value(answer, |_| {
        plan::text(task, plan, failures, evidence.as_deref())
    })?;
    Ok(if failures.is_empty() {
        Exit::Done
    } else {
        Exit::Refused
    })
}

/// Shows what the conductor does by itself, and pauses it or lets it go on.
pub async fn automation(
    session: &mut Session,
    order: order::SetAutomation,
) -> Result<Exit, Trouble> {
    let wished = order.request();
    let request = if order.dry_run {
        SetAutomation::default()
    } else {
        wished
    };
    let now = session.client.set_automation(&request).await?;
    session.screen.value(&now, |now| {
        let left = SetAutomation::default();
        automated(now, if order.dry_run { &wished } else { &left })
    })?;
    Ok(Exit::Done)
}

fn automated(now: &Automation, would: &SetAutomation) -> String {
    let line = |name: &str, state: &str, wished: Option<bool>| {
        let told = match state {
            "off" => "off: the conductor's settings do not ask for it",
            "on" => "on",
            "paused" => "paused: asked for by the conductor's settings, switched off for now",
            "shadow" => "shadow: it only logs what it would do",
            other => &clean(other),
        };
        let would = match wished {
            Some(true) => "; it would be switched on",
            Some(false) => "; it would be switched off",
            None => "",
        };
        format!("{name}  {told}{would}")
    };
    [
        line("evacuate", &now.evacuate, would.evacuate),
        line("balance ", &now.balance, would.balance),
    ]
    .join("\n")
}
