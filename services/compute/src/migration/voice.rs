//! How a transfer is told: to whoever asks, from the newest sample; to the
//! conductor about once a second, and at once when something changes.

use std::{sync::Arc, time::Duration};

use drover_model::{
    api::{compute::JobState, conductor::MigrationReport},
    ids::MigrationId,
    migration::{Phase, Progress},
};
use tokio::{sync::watch, time::Instant};

use crate::{
    journal::Ended,
    node::{Counters, Node},
};

/// Time between reports when nothing changes but numbers.
const REPORT_EVERY: Duration = Duration::from_secs(1);

/// See the module.
pub(super) struct Voice {
    node: Arc<Node>,
    migration: MigrationId,
    view: watch::Sender<JobState>,
    reported: Option<(Instant, Phase)>,
    /// Decisions that no report has carried yet.
    news: Vec<String>,
}

impl Voice {
    pub(super) fn new(
        node: Arc<Node>,
        migration: MigrationId,
        view: watch::Sender<JobState>,
    ) -> Self {
        Self {
            node,
            migration,
            view,
            reported: None,
            news: Vec::new(),
        }
    }

    /// A decision, for the next report.
    pub(super) fn decided(&mut self, text: String) {
        self.news.push(text);
    }

    /// Lets askers see the newest sample, and the conductor if it is time.
    pub(super) fn show(&mut self, progress: &Progress) {
        self.view.send_replace(JobState::Running {
            progress: Box::new(progress.clone()),
        });
        let due = self.reported.is_none_or(|(at, shown)| {
            shown != progress.phase || !self.news.is_empty() || at.elapsed() >= REPORT_EVERY
        });
        if due {
            self.reported = Some((Instant::now(), progress.phase));
            self.report(progress.clone(), None);
        }
    }

    /// Tells the end: askers first, then the conductor.
    pub(super) fn end(&mut self, ended: &Ended) {
        self.view.send_replace(ended.clone().into());
        self.report(ended.progress.clone(), Some(ended));
    }

    fn report(&mut self, progress: Progress, ended: Option<&Ended>) {
        let queued = self.node.conductor.report(MigrationReport {
            migration: self.migration,
            host: self.node.settings.host.clone(),
            progress,
            decisions: self.news.clone(),
            outcome: ended.map(|e| e.outcome.clone()),
        });
        if queued {
            self.news.clear();
        } else {
            Counters::add(&self.node.counters.migration_reports_lost);
        }
    }
}
