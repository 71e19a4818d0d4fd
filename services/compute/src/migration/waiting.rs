//! Waits that end never rather than wrongly, for a loop that waits for many
//! things at once. Each may be dropped and begun again.

use tokio::{sync::broadcast, task::JoinHandle};

use crate::hypervisor::{Event, HypervisorError};

/// The driver's call that moves a guest.
pub(super) type Transfer = JoinHandle<Option<Result<(), HypervisorError>>>;

/// The answer of a transfer that runs, which is taken away with it; for ever
/// silent if none runs.
pub(super) async fn answered(transfer: &mut Option<Transfer>) -> Result<(), HypervisorError> {
    let Some(running) = transfer else {
        return std::future::pending().await;
    };
    let answer = running.await;
    *transfer = None;
    let lost = |message: String| Err(HypervisorError::Lost(message));
    match answer {
        Ok(Some(answer)) => answer,
        Ok(None) => lost("the agent is stopping".to_owned()),
        Err(died) => lost(format!("the driver's call died: {died}")),
    }
}

/// The next event; for ever silent if the driver sends none any more. One that
/// was missed is no loss, for everything is looked at regularly too.
pub(super) async fn next_event(events: &mut Option<broadcast::Receiver<Event>>) -> Event {
    use broadcast::error::RecvError;
    while let Some(receiver) = events {
        match receiver.recv().await {
            Ok(event) => return event,
            Err(RecvError::Lagged(_)) => {}
            Err(RecvError::Closed) => *events = None,
        }
    }
    std::future::pending().await
}
