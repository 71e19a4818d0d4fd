//! libvirt's default event loop: one thread for the whole process, started
//! before the first connection and never stopped. It carries keep-alives,
//! domain events and the news that a connection closed.

use std::{sync::OnceLock, time::Duration};

use virt::{error, event};

use crate::hypervisor::{HypervisorError, Result};

static STARTED: OnceLock<std::result::Result<(), String>> = OnceLock::new();

/// Starts it, unless it runs already.
///
/// # Errors
/// `Bug` if libvirt or the system refuses; the first answer holds for good.
pub(super) fn start() -> Result<()> {
    STARTED
        .get_or_init(run)
        .clone()
        .map_err(HypervisorError::Bug)
}

fn run() -> std::result::Result<(), String> {
    // libvirt's own handler prints every error to standard error.
    error::clear_error_callback();
    event::event_register_default_impl()
        .map_err(|e| format!("libvirt's event loop: {}", e.message()))?;
    std::thread::Builder::new()
        .name("libvirt-events".to_owned())
        .spawn(|| {
            loop {
                if let Err(error) = event::event_run_default_impl() {
                    tracing::error!(error = error.message(), "libvirt's event loop stumbled");
                    std::thread::sleep(Duration::from_secs(1));
                }
            }
        })
        .map(drop)
        .map_err(|e| format!("no thread for libvirt's event loop: {e}"))
}
