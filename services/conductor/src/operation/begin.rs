//! Admission of operations: from what is wanted to a record that is driven, or
//! to a refusal that leaves nothing behind; and the dry run.

use drover_model::{
    check::{CheckCode, CheckFailure, Side},
    ids::HostName,
    migration::Requester,
    operation::{Operation, Returning, Task},
};
use drover_store::{Store, StoreError, nodes::NodeRow, operations::Begun};
use tracing::info;

use super::{
    evacuation,
    look::{self, Planned},
    record,
    runner::OperationRunner,
};
use crate::{
    checks::{self, Liveness},
    plan::Examinations,
};

/// What came of wanting an operation.
#[derive(Debug, Clone, PartialEq)]
pub enum Answer {
    /// It is on the record and driven, or was already.
    Accepted(Box<Operation>),
    /// Every reason why not.
    Refused(Vec<CheckFailure>),
}

impl OperationRunner {
    /// Puts an operation on the record and has it driven. The same that is under
    /// way already is answered with that one; with other options it is another, and
    /// is refused.
    ///
    /// # Errors
    /// The record cannot be read or written.
    pub async fn begin(
        &self,
        task: Task,
        requester: Requester,
        unique_id: Option<&str>,
    ) -> Result<Answer, StoreError> {
        let failures = self.failures(&task).await?;
        if !failures.is_empty() {
            return Ok(Answer::Refused(failures));
        }
        let now_ms = self.context.clock.now_ms();
        let mut new = Operation::new(task, requester, self.moves.owner(), now_ms);
        let text = format!("{} asked for", new.task.kind());
        record::decide(&mut new, now_ms, text);
        let store = &self.context.store;
        let term = self.moves.term();
        Ok(
            match store
                .begin_operation(&new, unique_id, term.recorded)
                .await?
            {
                Begun::New(operation) => {
                    info!(
                        operation = operation.id,
                        kind = operation.task.kind(),
                        "accepted"
                    );
                    self.spawn(Store::first_operation_lease(operation.uuid), term);
                    Answer::Accepted(operation)
                }
                Begun::Repeated(operation) => Answer::Accepted(operation),
                Begun::Busy(other) if other.task == new.task => Answer::Accepted(other),
                Begun::Busy(other) => Answer::Refused(vec![busy(&other)]),
            },
        )
    }

    /// What would be done, and what stands in the way of it.
    ///
    /// # Errors
    /// The record cannot be read.
    pub async fn dry_run(
        &self,
        task: &Task,
        requester: &Requester,
    ) -> Result<(Planned, Vec<CheckFailure>), StoreError> {
        let mut failures = self.failures(task).await?;
        if failures.is_empty() {
            let other = self.context.store.active_operation(task.host()).await?;
            let other = other.filter(|o| o.task != *task);
            failures.extend(other.as_ref().map(busy));
        } else {
            return Ok((Planned::default(), failures));
        }
        let (mut evidence, mut examinations) = (None, Examinations::new());
        if let Task::Evacuate(options) = task {
            let (known, against) = evacuation::inspect(&self.context, options, requester).await?;
            evidence = Some(known);
            failures.extend(against);
            examinations = evacuation::examine(&self.context, options).await?;
        }
        let mut planned = look::plan(&self.context, task, None, examinations).await?;
        planned.evidence = evidence;
        Ok((planned, failures))
    }

    async fn failures(&self, task: &Task) -> Result<Vec<CheckFailure>, StoreError> {
        let nodes = self.context.store.nodes().await?;
        Ok(failures(task, &nodes, self.context.liveness()))
    }
}

/// What the record says against an operation.
fn failures(task: &Task, nodes: &[NodeRow], live: Liveness) -> Vec<CheckFailure> {
    let mut failures = bounds(task);
    let row = |host: &HostName| nodes.iter().find(|row| row.report.host == *host);
    let side = |host: &HostName, side| checks::node(host, row(host), side, live);
    let (host, to): (Option<&HostName>, &[HostName]) = match task {
        Task::Drain(o) => (Some(&o.host), &o.to),
        Task::Evacuate(o) => (Some(&o.host), &o.to),
        Task::Restore(o) => (Some(&o.host), &[]),
        Task::Balance(_) => (None, &[]),
    };
    if let Some(host) = host {
        let at_node = side(host, Side::Source);
        failures.extend(at_node.into_iter().filter_map(|f| of_node(f, host, task)));
        failures.extend(to.iter().filter(|to| *to == host).map(to_itself));
    }
    for target in to {
        let unknown = side(target, Side::Destination);
        failures.extend(
            unknown
                .into_iter()
                .filter(|f| f.code == CheckCode::UnknownHost),
        );
    }
    failures
}

/// A failure of the node itself, if it matters to the task.
fn of_node(mut failure: CheckFailure, host: &HostName, task: &Task) -> Option<CheckFailure> {
    match task {
        _ if failure.code == CheckCode::UnknownHost => Some(failure),
        // Its being down is the point.
        Task::Evacuate(_) => None,
        Task::Restore(o) if o.returning == Returning::None => None,
        Task::Drain(_) if failure.code == CheckCode::HostDown => {
            failure.remedy = format!(
                "if it is dead, 'drover node evacuate {host}' starts its guests elsewhere; {}",
                failure.remedy
            );
            Some(failure)
        }
        _ => Some(failure),
    }
}

fn bounds(task: &Task) -> Vec<CheckFailure> {
    let (live, cold, threshold, moves) = match task {
        Task::Drain(o) => (o.live.problems(), o.cold.problems(), None, None),
        Task::Balance(o) => (vec![], vec![], o.threshold_percent, o.max_moves),
        Task::Restore(_) | Task::Evacuate(_) => (vec![], vec![], None, None),
    };
    let numbers = [
        ("max_parallel", task.max_parallel(), 1, 1000),
        ("threshold_percent", threshold, 1, 100),
        ("max_moves", moves, 1, 1000),
    ];
    let numbers = numbers.into_iter().filter_map(|(name, value, low, high)| {
        let value = value.filter(|v| !(low..=high).contains(v))?;
        Some(format!("{name} is {value}; it may be {low} to {high}"))
    });
    let unknown = task.unknown().problems();
    let problems = numbers.chain(live).chain(cold).chain(unknown);
    let failure = |message| CheckFailure {
        code: CheckCode::Options,
        side: Side::Request,
        message,
        remedy: "give a value within the bounds".to_owned(),
    };
    problems.map(failure).collect()
}

fn to_itself(host: &HostName) -> CheckFailure {
    CheckFailure {
        code: CheckCode::SameHost,
        side: Side::Request,
        message: format!("{host} is the node that its guests are to leave"),
        remedy: "name other nodes, or none to have them chosen".to_owned(),
    }
}

fn busy(other: &Operation) -> CheckFailure {
    let subject = other.task.host().map_or("all nodes", HostName::as_str);
    CheckFailure {
        code: CheckCode::HostBusy,
        side: Side::Request,
        message: format!(
            "operation {} ({} of {subject}) is {} since before",
            other.id,
            other.task.kind(),
            other.status
        ),
        remedy: format!(
            "wait for it, or end it with 'drover operation cancel {}'",
            other.id
        ),
    }
}
