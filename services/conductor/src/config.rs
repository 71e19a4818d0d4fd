//! The `[conductor]` section.

use std::time::Duration;

use serde::Deserialize;

use crate::{agent_client::CallLimits, operation::auto_evacuate::AutoEvacuate};

/// Settings of a conductor.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ConductorSettings {
    /// Name of this conductor; leases on migrations are held in it, so it must
    /// stay the same over restarts and differ between conductors. Default: the
    /// machine's host name.
    pub name: Option<String>,
    /// Where the record is.
    pub database_url: String,
    /// A node that was not heard from for so long is down, seconds.
    pub service_down_time_s: u64,
    /// Operations that run at once; more wait as *accepted*.
    pub max_concurrent_migrations: usize,
    /// How long an agent may take to answer a question, seconds.
    pub agent_timeout_s: u64,
    /// After so long without a word from its owner, another conductor takes an
    /// operation over, seconds.
    pub lease_s: u64,
    /// A finished cold migration that nobody confirmed or reverted is confirmed
    /// after so long, seconds; 0 is never.
    pub resize_confirm_window_s: u64,
    /// How long a fencing agent may take to cut a node's power, or to say whether
    /// it has any, seconds.
    pub fence_timeout_s: u64,
    /// Whether dead nodes are evacuated without being asked; only those with a
    /// fencing agent.
    pub auto_evacuate: bool,
    /// How long a node has to be down before that, seconds.
    pub auto_evacuate_delay_s: u64,
    /// Nodes that are evacuated without being asked at one time.
    pub auto_evacuate_max_nodes: u32,
}

impl Default for ConductorSettings {
    fn default() -> Self {
        Self {
            name: None,
            database_url: "sqlite:///var/lib/drover/conductor.sqlite".to_owned(),
            service_down_time_s: 30,
            max_concurrent_migrations: 64,
            agent_timeout_s: 15,
            lease_s: 30,
            resize_confirm_window_s: 0,
            fence_timeout_s: 60,
            auto_evacuate: false,
            auto_evacuate_delay_s: 120,
            auto_evacuate_max_nodes: 1,
        }
    }
}

impl ConductorSettings {
    /// The first value that cannot be: its key, and what is wrong with it.
    pub fn problem(&self) -> Option<(&'static str, String)> {
        let bounds = [
            ("service_down_time_s", self.service_down_time_s, 2, 3600),
            ("agent_timeout_s", self.agent_timeout_s, 1, 600),
            ("lease_s", self.lease_s, 3, 3600),
            ("fence_timeout_s", self.fence_timeout_s, 1, 3600),
            (
                "auto_evacuate_delay_s",
                self.auto_evacuate_delay_s,
                0,
                86_400,
            ),
            (
                "auto_evacuate_max_nodes",
                self.auto_evacuate_max_nodes.into(),
                1,
                100,
            ),
            (
                "resize_confirm_window_s",
                self.resize_confirm_window_s,
                0,
                31_536_000,
            ),
            (
                "max_concurrent_migrations",
                self.max_concurrent_migrations as u64,
                1,
                10_000,
            ),
        ];
        let broken = bounds
            .into_iter()
            .find(|(_, v, low, high)| !(low..=high).contains(&v));
        if let Some((key, value, low, high)) = broken {
            return Some((key, format!("is {value}; it may be {low} to {high}")));
        }
        let name = self.name.as_deref()?;
        (name.is_empty() || name.len() > 253)
            .then(|| ("name", "must be 1 to 253 characters".to_owned()))
    }

    /// How long a fencing agent may take.
    pub fn fence_timeout(&self) -> Duration {
        Duration::from_secs(self.fence_timeout_s)
    }

    /// Whether and when dead nodes are evacuated without being asked.
    pub fn auto_evacuate(&self) -> AutoEvacuate {
        AutoEvacuate {
            is_on: self.auto_evacuate,
            delay_ms: self.auto_evacuate_delay_s * 1000,
            max_nodes: self.auto_evacuate_max_nodes as usize,
        }
    }

    /// Time limits of calls to agents.
    pub fn call_limits(&self) -> CallLimits {
        CallLimits {
            check: Duration::from_secs(self.agent_timeout_s),
            ..CallLimits::default()
        }
    }
}
