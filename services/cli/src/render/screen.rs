//! The streams a command writes to, and in which manner. Results go to
//! standard output, trouble and notices to standard error.

use std::io::{self, IsTerminal, Write};

use rustix::termios::tcgetwinsize;
use serde::Serialize;

use super::{json, outcome};
use crate::exit::Trouble;

/// In which manner results are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Manner {
    /// Lines of text, nothing ever overwritten.
    Plain,
    /// Text on a terminal that can redraw.
    Terminal,
    /// JSON.
    Json,
}

/// Where a command writes.
pub struct Screen {
    out: Box<dyn Write + Send>,
    err: Box<dyn Write + Send>,
    manner: Manner,
    /// Whether standard output is where it writes: its terminal has a size.
    is_standard: bool,
}

/// Lines of a terminal that does not tell how many it has.
const USUAL_ROWS: usize = 24;

impl Screen {
    /// The process's own streams.
    pub fn standard(as_json: bool) -> Self {
        let dumb = std::env::var_os("TERM").is_none_or(|term| term == "dumb");
        let manner = match (as_json, io::stdout().is_terminal() && !dumb) {
            (true, _) => Manner::Json,
            (false, true) => Manner::Terminal,
            (false, false) => Manner::Plain,
        };
        Self {
            is_standard: true,
            ..Self::new(Box::new(io::stdout()), Box::new(io::stderr()), manner)
        }
    }

    /// Any streams.
    pub fn new(out: Box<dyn Write + Send>, err: Box<dyn Write + Send>, manner: Manner) -> Self {
        Self {
            out,
            err,
            manner,
            is_standard: false,
        }
    }

    /// How many lines fit on it.
    pub fn rows(&self) -> usize {
        let size = self.is_standard.then(|| tcgetwinsize(io::stdout()).ok());
        let rows = size.flatten().map(|size| usize::from(size.ws_row));
        rows.filter(|rows| *rows > 0).unwrap_or(USUAL_ROWS)
    }

    /// In which manner results are written.
    pub fn manner(&self) -> Manner {
        self.manner
    }

    /// Writes a result: the value itself as JSON, or its text.
    pub fn value<T: Serialize>(
        &mut self,
        value: &T,
        text: impl FnOnce(&T) -> String,
    ) -> Result<(), Trouble> {
        let text = match self.manner {
            Manner::Json => json::pretty(value),
            Manner::Plain | Manner::Terminal => text(value),
        };
        self.line(&text)
    }

    /// Writes a line for people; JSON readers have the value.
    pub fn say(&mut self, text: &str) -> Result<(), Trouble> {
        match self.manner {
            Manner::Json => Ok(()),
            Manner::Plain | Manner::Terminal => self.line(text),
        }
    }

    /// Writes a line as it is.
    pub fn line(&mut self, text: &str) -> Result<(), Trouble> {
        writeln!(self.out, "{text}")?;
        Ok(self.out.flush()?)
    }

    /// Writes bytes as they are.
    pub fn raw(&mut self, bytes: &[u8]) -> Result<(), Trouble> {
        self.out.write_all(bytes)?;
        Ok(self.out.flush()?)
    }

    /// Says something beside the results. Nobody listening is no trouble.
    pub fn notice(&mut self, text: &str) {
        let _ = writeln!(self.err, "{text}");
    }

    /// Asks something; the answer is typed behind it.
    pub fn ask(&mut self, question: &str) {
        let _ = write!(self.err, "{question}");
        let _ = self.err.flush();
    }

    /// Tells trouble: as JSON where results are JSON, else on standard error.
    pub fn trouble(&mut self, trouble: &Trouble) {
        if trouble.message.is_empty() {
            return;
        }
        let _ = match self.manner {
            Manner::Json => self.line(&json::trouble(trouble)),
            Manner::Plain | Manner::Terminal => {
                self.notice(&outcome::trouble(trouble));
                Ok(())
            }
        };
    }
}
