//! Following an operation to its end. As with a migration, the wait is a long
//! poll, and a conductor that is away for a while ends nothing; only that an
//! answer comes each second, for the sake of the migrations that are shown.

use drover_model::{
    api::conductor::OperationView,
    operation::{Operation, OperationStatus},
};
use tokio::time::{Instant, sleep_until};

use super::{
    Session,
    waiting::{self, Halt, PAUSE, Silence, at},
};
use crate::{
    client::Client,
    exit::{Exit, Trouble},
    render::{
        operation::{board::Board, ending, noun},
        screen::{Manner, Screen},
    },
};

/// What the operator wants of the operation that is followed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Goal {
    /// That every guest moves.
    Completed,
    /// That it is called off.
    Cancelled,
}

impl Goal {
    /// How a command ends whose operation ended so.
    fn exit(self, o: &Operation) -> Exit {
        match (self, o.status) {
            (Self::Completed, OperationStatus::Completed)
            | (Self::Cancelled, OperationStatus::Cancelled) => Exit::Done,
            (_, OperationStatus::Failed) if !o.refusals.is_empty() => Exit::Refused,
            _ => Exit::Failed,
        }
    }
}

/// Follows an operation and tells its end.
pub async fn run(
    session: &mut Session,
    first: OperationView,
    mut board: Board,
    deadline: Option<Instant>,
    goal: Goal,
) -> Result<Exit, Trouble> {
    let mut view = first;
    board.show(&mut session.screen, &view)?;
    let halt = loop {
        if view.operation.status.is_final() {
            break Halt::Over;
        }
        let Session {
            client,
            screen,
            interrupt,
            ..
        } = &mut *session;
        tokio::select! {
            biased;
            () = interrupt => break Halt::Interrupt,
            next = next(client, &view, &mut board, screen) => view = next?,
            () = at(deadline) => break Halt::Timeout,
        }
        board.show(&mut session.screen, &view)?;
    };
    conclude(session, &view, &board, &halt, goal)
}

/// The next answer: a newer record, or the same with newer migrations. A record
/// that is older than the one seen is not taken.
async fn next(
    client: &Client,
    seen: &OperationView,
    board: &mut Board,
    screen: &mut Screen,
) -> Result<OperationView, Trouble> {
    let mut silence = Silence::default();
    loop {
        let asked = Instant::now();
        let operation = &seen.operation;
        match client.wait_operation(operation).await {
            Ok(view) if view.operation.version > operation.version => return Ok(view),
            Ok(view) if view.operation.status.is_final() => return Ok(view),
            Ok(view) => {
                silence.is_over();
                // Answered at once: not in a hurry.
                sleep_until(asked + PAUSE).await;
                if view.operation.version == operation.version {
                    return Ok(view);
                }
            }
            Err(trouble) => {
                let tell = |trouble: &Trouble| {
                    let (told, noun) = (&trouble.message, noun(&operation.task));
                    let words = format!("drover: {told}; {noun} goes on without it, still asking");
                    board.notice(screen, &words);
                };
                let borne = silence.bear(trouble, asked, tell).await;
                borne.map_err(|trouble| given_up(trouble, operation))?;
            }
        }
    }
}

fn given_up(trouble: Trouble, o: &Operation) -> Trouble {
    let watch = format!("operation watch {}", o.id);
    waiting::given_up(trouble, &noun(&o.task), &watch)
}

/// That it goes on without this command, and what can be done about it.
pub fn goes_on(what: &str, o: &Operation) -> String {
    let (noun, id) = (noun(&o.task), o.id);
    format!(
        "drover: {what}: {noun} goes on\n  \
         to watch it:    `drover operation watch {id}`\n  \
         to call it off: `drover operation cancel {id}`"
    )
}

fn conclude(
    session: &mut Session,
    view: &OperationView,
    board: &Board,
    halt: &Halt,
    goal: Goal,
) -> Result<Exit, Trouble> {
    let o = &view.operation;
    if session.screen.manner() == Manner::Json && !board.is_streaming() {
        session.screen.value(view, |_| String::new())?;
    }
    match halt {
        Halt::Over => {
            session.screen.say(&ending::text(o))?;
            Ok(goal.exit(o))
        }
        Halt::Timeout => {
            session.screen.notice(&goes_on("not over in time", o));
            Ok(Exit::TimedOut)
        }
        Halt::Interrupt => waiting::interrupted(&mut session.screen, &goes_on("interrupted", o)),
    }
}
