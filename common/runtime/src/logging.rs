//! Where log lines go: standard error, as text or JSON.

use serde::{Deserialize, Serialize};
use tracing_subscriber::{EnvFilter, fmt};

/// The `[log]` section.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LogSettings {
    /// Filter as `tracing` reads it: `info`, `debug`, `drover_conductor=debug,warn`.
    pub level: String,
    /// Form of a line.
    pub format: LogFormat,
}

/// Form of a log line.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// For people.
    Text,
    /// For machines: one JSON object a line.
    Json,
}

impl Default for LogSettings {
    fn default() -> Self {
        Self {
            level: "info".to_owned(),
            format: LogFormat::Text,
        }
    }
}

/// Starts logging. The environment's `DROVER_LOG` comes before the file's level.
///
/// # Errors
/// The filter cannot be read; the text says which.
pub fn init(settings: &LogSettings) -> Result<(), String> {
    let text = std::env::var("DROVER_LOG").unwrap_or_else(|_| settings.level.clone());
    let filter = EnvFilter::try_new(&text)
        .map_err(|e| format!("log level '{text}' cannot be read ({e}); try 'info' or 'debug'"))?;
    let builder = fmt().with_env_filter(filter).with_writer(std::io::stderr);
    let started = match settings.format {
        LogFormat::Text => builder
            .with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr()))
            .try_init(),
        LogFormat::Json => builder.json().try_init(),
    };
    started.map_err(|e| format!("logging is already running: {e}"))
}
