//! What following a migration and following an operation share: how long a
//! conductor may be away, and why the wait ends.

use std::time::Duration;

use tokio::time::{Instant, sleep, sleep_until};

use crate::{
    exit::{Exit, Trouble},
    render::screen::{Manner, Screen},
};

/// How long a conductor may be away before the wait is given up.
const SILENCE: Duration = Duration::from_secs(180);
/// Pause before asking again a conductor that did not answer, or had nothing new.
pub(super) const PAUSE: Duration = Duration::from_millis(500);

/// Why following stopped.
pub(super) enum Halt {
    /// Nothing more happens.
    Over,
    /// The operator did not want to wait longer.
    Timeout,
    /// The operator has had enough.
    Interrupt,
}

/// When the wait is to end, if it is.
pub(super) async fn at(deadline: Option<Instant>) {
    match deadline {
        Some(at) => sleep_until(at).await,
        None => std::future::pending().await,
    }
}

/// A conductor that does not answer. What was begun goes on without it, and so
/// does the wait.
#[derive(Debug, Default)]
pub(super) struct Silence {
    since: Option<Instant>,
}

impl Silence {
    /// It has answered.
    pub(super) fn is_over(&mut self) {
        self.since = None;
    }

    /// Waits a little before it is asked again; has that told the first time.
    ///
    /// # Errors
    /// The trouble, if it does not pass, or has lasted for too long.
    pub(super) async fn bear(
        &mut self,
        trouble: Trouble,
        asked: Instant,
        tell: impl FnOnce(&Trouble),
    ) -> Result<(), Trouble> {
        if !trouble.may_pass() {
            return Err(trouble);
        }
        let since = *self.since.get_or_insert_with(|| {
            tell(&trouble);
            asked
        });
        if since.elapsed() >= SILENCE {
            return Err(trouble);
        }
        sleep(PAUSE).await;
        Ok(())
    }
}

/// The wait is given up; `watch` is the command that takes it up again.
pub(super) fn given_up(trouble: Trouble, what: &str, watch: &str) -> Trouble {
    let look = format!("when the conductor answers again: `drover {watch}`");
    let message = format!("{}; how {what} ends is unknown here", trouble.message);
    Trouble { message, ..trouble }.remedy(look)
}

/// Says that it goes on without this command.
///
/// # Errors
/// The screen cannot be written to.
pub(super) fn interrupted(screen: &mut Screen, goes_on: &str) -> Result<Exit, Trouble> {
    if screen.manner() == Manner::Terminal {
        // The terminal has written ^C where the next line begins.
        screen.raw(b"\r\x1b[2K")?;
    }
    screen.notice(goes_on);
    Ok(Exit::Interrupted)
}
