//! Following a migration to its end. The wait is a long poll: the conductor
//! answers the moment the record changes, so nothing here sleeps while all is
//! well. A conductor that is away for a while ends nothing: the migration goes
//! on without it, and so does the wait.

use drover_model::migration::{EndReason, Ending, Migration, MigrationStatus};
use tokio::time::{Instant, sleep};

use super::{
    Session,
    waiting::{self, Halt, PAUSE, Silence, at},
};
use crate::{
    args::Change,
    client::Client,
    exit::{Exit, Trouble},
    render::{
        clean, describe,
        meter::Meter,
        outcome,
        screen::{Manner, Screen},
    },
};

/// What the operator wants of the migration that is followed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Goal {
    /// That the guest gets there.
    Moved,
    /// That it stays.
    Aborted,
    /// That it moves again after it was stuck.
    Resumed,
    /// That its old node gives up its copy.
    Confirmed,
    /// That the guest comes back.
    Reverted,
}

impl Goal {
    /// What somebody who only looks on wants of it.
    pub fn of_onlooker(m: &Migration) -> Self {
        match m.status {
            MigrationStatus::Reverting => Self::Reverted,
            _ => Self::Moved,
        }
    }

    /// What is wanted of that one: of one that was being settled when it became
    /// stuck, that.
    pub fn of(self, m: &Migration) -> Self {
        match (self, m.ending) {
            (Self::Resumed, Some(Ending::Confirm)) => Self::Confirmed,
            (Self::Resumed, Some(Ending::Revert)) => Self::Reverted,
            _ => self,
        }
    }

    /// Whether that is what became of it.
    fn is_met(self, m: &Migration) -> bool {
        match self {
            Self::Moved | Self::Resumed => m.status.has_moved(),
            Self::Aborted => m.status == MigrationStatus::Cancelled,
            Self::Confirmed => m.status == MigrationStatus::Confirmed,
            Self::Reverted => m.status == MigrationStatus::Reverted,
        }
    }
}

/// Goes on with what the conductor has accepted: follows it to its end, or just
/// names it to a caller that does not wait.
pub async fn go_on(
    session: &mut Session,
    record: Migration,
    change: Change,
    deadline: Option<Instant>,
    goal: Goal,
) -> Result<Exit, Trouble> {
    if change.no_wait {
        accepted(session, &record)?;
        return Ok(Exit::Done);
    }
    run(session, record, Meter::new(), deadline, goal).await
}

/// Follows a migration and tells its end.
pub async fn run(
    session: &mut Session,
    first: Migration,
    mut meter: Meter,
    deadline: Option<Instant>,
    goal: Goal,
) -> Result<Exit, Trouble> {
    let mut record = first;
    // A record that rests or is stuck when something is done about it is about to change.
    let mut about_to_change = goal != Goal::Moved;
    meter.show(&mut session.screen, &record)?;
    let halt = loop {
        if is_over(&record) && (record.status.is_final() || !about_to_change) {
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
            next = next(client, &record, &mut meter, screen) => record = next?,
            () = at(deadline) => break Halt::Timeout,
        }
        about_to_change = false;
        meter.show(&mut session.screen, &record)?;
    };
    conclude(session, &record, &meter, &halt, goal)
}

/// Says that a migration is on its way: its id, for scripts to go on with.
fn accepted(session: &mut Session, m: &Migration) -> Result<(), Trouble> {
    session.screen.value(m, |m| m.id.to_string())?;
    if session.screen.manner() == Manner::Terminal {
        session.screen.notice(&goes_on("accepted", m));
    }
    Ok(())
}

/// Nothing more happens, unless somebody acts.
fn is_over(m: &Migration) -> bool {
    m.status.rests() || m.status == MigrationStatus::Stuck
}

/// The next record that differs from the one seen.
async fn next(
    client: &Client,
    seen: &Migration,
    meter: &mut Meter,
    screen: &mut Screen,
) -> Result<Migration, Trouble> {
    let mut silence = Silence::default();
    loop {
        let asked = Instant::now();
        match client.wait_migration(seen).await {
            Ok(record) if record.version != seen.version || record.status.is_final() => {
                return Ok(record);
            }
            // Asked to wait and answered at once with nothing new: not in a hurry.
            Ok(_) if asked.elapsed() < PAUSE => sleep(PAUSE).await,
            Ok(_) => silence.is_over(),
            Err(trouble) => {
                let tell = |trouble: &Trouble| meter.notice(screen, &silent(trouble, seen));
                let borne = silence.bear(trouble, asked, tell).await;
                borne.map_err(|trouble| given_up(trouble, seen))?;
            }
        }
    }
}

fn silent(trouble: &Trouble, m: &Migration) -> String {
    format!(
        "drover: {}; the {} goes on without it, still asking",
        trouble.message,
        describe::noun(m)
    )
}

fn given_up(trouble: Trouble, m: &Migration) -> Trouble {
    let (what, watch) = (
        format!("migration {}", m.id),
        format!("migration watch {}", m.id),
    );
    waiting::given_up(trouble, &what, &watch)
}

fn goes_on(what: &str, m: &Migration) -> String {
    let (name, noun, id) = (clean(&m.instance_name), describe::noun(m), m.id);
    let doing = match m.ending {
        None => "",
        Some(Ending::Confirm) => "confirming ",
        Some(Ending::Revert) => "reverting ",
    };
    let text = format!(
        "drover: {what}: {doing}the {noun} of {name} goes on\n  \
         to watch it: `drover migration watch {id}`"
    );
    if m.status.may_become(MigrationStatus::Cancelled) {
        text + &format!("\n  to end it:   `drover migration abort {id}`")
    } else {
        text
    }
}

fn conclude(
    session: &mut Session,
    m: &Migration,
    meter: &Meter,
    halt: &Halt,
    goal: Goal,
) -> Result<Exit, Trouble> {
    if session.screen.manner() == Manner::Json && !meter.is_streaming() {
        session.screen.value(m, outcome::end)?;
    }
    match halt {
        Halt::Over => {
            session.screen.say(&outcome::end(m))?;
            if m.status == MigrationStatus::Finished && !goal.is_met(m) {
                session.screen.notice(&outcome::unsettled(m));
            }
            Ok(exit(m, goal))
        }
        Halt::Timeout => {
            session.screen.notice(&goes_on("not over in time", m));
            Ok(Exit::TimedOut)
        }
        Halt::Interrupt => waiting::interrupted(&mut session.screen, &goes_on("interrupted", m)),
    }
}

/// How a command ends whose migration ended so.
fn exit(m: &Migration, goal: Goal) -> Exit {
    match m.end_reason {
        _ if goal.is_met(m) => Exit::Done,
        Some(EndReason::Refused { .. }) => Exit::Refused,
        _ => Exit::Failed,
    }
}
