//! A display on a terminal that is redrawn in place.

use super::screen::Screen;
use crate::exit::Trouble;

/// The terminal cuts lines that are too long instead of breaking them, so that
/// as many lines are drawn as are overwritten the next time.
const NO_WRAP: &str = "\x1b[?7l";
const WRAP: &str = "\x1b[?7h";

/// How much of the terminal is taken by what was drawn last.
#[derive(Debug, Default)]
pub struct Frame {
    drawn: usize,
}

impl Frame {
    /// Draws lines where the last ones stand.
    pub fn draw(&mut self, screen: &mut Screen, lines: &[String]) -> Result<(), Trouble> {
        let mut frame = NO_WRAP.to_owned();
        if self.drawn > 0 {
            frame.push_str(&format!("\x1b[{}A", self.drawn));
        }
        for line in lines {
            frame.push_str(&format!("\r\x1b[2K{line}\n"));
        }
        // A display that has become shorter leaves nothing of the longer one.
        frame.push_str("\x1b[J");
        frame.push_str(WRAP);
        self.drawn = lines.len();
        screen.raw(frame.as_bytes())
    }

    /// Leaves what is drawn where it is; the next lines come below it.
    pub fn leave(&mut self) {
        self.drawn = 0;
    }
}
