//! Shows a migration while it goes on: redrawn bars on a terminal, lines at
//! most once a second elsewhere, one object a line as JSON.

use std::time::Duration;

use drover_model::migration::{Migration, MigrationStatus, Phase};
use tokio::time::Instant;

use super::{
    clean,
    frame::Frame,
    json,
    progress::{self, Shown},
    screen::{Manner, Screen},
};
use crate::exit::Trouble;

/// A pipe gets a line this often at most, and one at each change of phase.
const LINE_INTERVAL: Duration = Duration::from_secs(1);

/// What has been shown so far.
#[derive(Debug, Default)]
pub struct Meter {
    shown: Shown,
    /// JSON of every record, or of none.
    stream: bool,
    frame: Frame,
    last: Option<(Instant, MigrationStatus, Phase)>,
}

impl Meter {
    /// A meter that shows nothing as JSON: its reader gets the last record.
    pub fn new() -> Self {
        Self::default()
    }

    /// A meter that writes every record as JSON.
    pub fn streaming() -> Self {
        Self {
            stream: true,
            ..Self::default()
        }
    }

    /// Whether every record is written as JSON.
    pub fn is_streaming(&self) -> bool {
        self.stream
    }

    /// Shows a record.
    pub fn show(&mut self, screen: &mut Screen, migration: &Migration) -> Result<(), Trouble> {
        self.shown.take(migration);
        match screen.manner() {
            Manner::Json if self.stream => screen.line(&json::line(migration)),
            Manner::Json => Ok(()),
            Manner::Terminal => {
                let bars = progress::bars(migration, &self.shown);
                self.frame.draw(screen, &bars)
            }
            Manner::Plain if self.is_due(migration) => {
                screen.line(&progress::line(migration, &self.shown))
            }
            Manner::Plain => Ok(()),
        }
    }

    /// Says something in between; the bars are drawn anew below it.
    pub fn notice(&mut self, screen: &mut Screen, text: &str) {
        self.frame.leave();
        screen.notice(&clean(text));
    }

    fn is_due(&mut self, m: &Migration) -> bool {
        let (now, phase) = (Instant::now(), m.progress.phase);
        let due = self.last.is_none_or(|(at, status, before)| {
            (status, before) != (m.status, phase) || now.duration_since(at) >= LINE_INTERVAL
        });
        if due {
            self.last = Some((now, m.status, phase));
        }
        due
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::samples::{self, Tape};

    #[tokio::test(start_paused = true)]
    async fn a_pipe_gets_a_line_a_second_and_one_at_each_change() {
        let tape = Tape::default();
        let mut screen = tape.screen(Manner::Plain);
        let mut meter = Meter::new();
        meter.show(&mut screen, &samples::migration()).unwrap();
        let mut running = samples::running(samples::migration());
        for moved in 1..=30 {
            running.progress.memory = samples::sent(moved << 20, 128 << 20);
            meter.show(&mut screen, &running).unwrap();
            tokio::time::advance(Duration::from_millis(100)).await;
        }
        let text = tape.out();
        let moved: Vec<&str> = text
            .lines()
            .filter_map(|l| l.split("memory ").nth(1))
            .collect();
        let starts: Vec<&str> = moved.iter().map(|t| t.split('/').next().unwrap()).collect();
        assert_eq!(starts, ["1", "11", "21"], "{text}");
        assert_eq!(text.lines().count(), 4);
        assert!(!text.contains('\x1b'));
    }

    #[test]
    fn a_terminal_is_redrawn_in_place() {
        let tape = Tape::default();
        let mut screen = tape.screen(Manner::Terminal);
        let mut meter = Meter::new();
        let running = samples::running(samples::migration());
        meter.show(&mut screen, &running).unwrap();
        meter
            .show(&mut screen, &samples::completed(running))
            .unwrap();
        let text = tape.out();
        assert_eq!(text.matches("\x1b[4A").count(), 1, "{text:?}");
        assert!(text.contains("100 %") && text.ends_with("\x1b[J\x1b[?7h"));
    }
}
