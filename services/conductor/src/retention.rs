//! Has the record forget what was kept for long enough: a batch at a time, with
//! room for others in between. Every conductor does; what one has forgotten
//! another does not find.

use std::time::Duration;

use drover_runtime::error_chain::Chain;
use drover_store::retention::Retention;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::{app::Context, clock::goes_on_after};

/// Time between two passes.
const PASS: Duration = Duration::from_secs(600);
/// Rest after a batch.
const REST: Duration = Duration::from_millis(200);

/// Until told to stop.
pub async fn keep(context: Context, retention: Retention, stop: CancellationToken) {
    while goes_on_after(PASS, &stop).await {
        let mut forgotten = 0;
        loop {
            let now_ms = context.clock.now_ms();
            match context.store.prune(retention, now_ms).await {
                Ok(0) => break,
                Ok(rows) => forgotten += rows,
                Err(error) => {
                    warn!(error = %Chain(&error), "nothing more is forgotten now; tried again later");
                    break;
                }
            }
            if !goes_on_after(REST, &stop).await {
                return;
            }
        }
        if forgotten > 0 {
            info!(rows = forgotten, "forgot what was kept for long enough");
        }
    }
}
