//! What the verbs do, one module per noun. A command gets a [`Session`], writes
//! its result to the session's screen and ends with an exit code or trouble.

pub mod doctor;
pub mod follow;
pub mod instance;
pub mod migration;
pub mod node;

use std::pin::Pin;

use crate::{client::Client, render::screen::Screen};

/// Completes when the operator interrupts.
pub type Interrupt = Pin<Box<dyn Future<Output = ()> + Send>>;

/// What a command works with.
pub struct Session {
    /// Whom to ask.
    pub client: Client,
    /// Where to write.
    pub screen: Screen,
    /// When to stop waiting.
    pub interrupt: Interrupt,
}
