//! The `[conductor]` section, and `[fence]`, which goes with it.

use std::{collections::BTreeMap, time::Duration};

use drover_model::{api::SPEAKS, ids::HostName, version::VersionRange};
use drover_runtime::config::{ConfigError, Document};
use drover_store::{fencing::FenceLimits, retention::Retention};
use serde::Deserialize;

use crate::{
    agent_client::CallLimits,
    operation::{auto_evacuate::AutoEvacuate, fence::FenceSettings},
    plan::{balance::Goal, schedule::Limits},
};

/// Settings of a conductor.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ConductorSettings {
    /// Versions of RPC that it speaks: this build's, but for tests.
    #[serde(skip)]
    pub speaks: VersionRange,
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
    /// Nodes whose power is cut within an hour at the most, without being asked.
    pub auto_evacuate_max_per_hour: u32,
    /// How often one node's power is cut within an hour at the most, without
    /// being asked.
    pub auto_evacuate_max_per_node: u32,
    /// Transfers from one node at a time.
    pub max_outbound_per_node: u32,
    /// Transfers to one node at a time.
    pub max_inbound_per_node: u32,
    /// Transfers in all at a time.
    pub max_transfers: u32,
    /// Live moves of an operation that are made ready beyond those that send.
    pub prepare_ahead: u32,
    /// Guests of an operation that are under way at once, if its caller did not
    /// say.
    pub max_parallel_per_operation: u32,
    /// Whether load is balanced without being asked: not, only told what would
    /// be done, or done.
    pub balance_mode: BalanceMode,
    /// Largest spread of load that is left, percent points.
    pub balance_threshold_percent: u32,
    /// Load is averaged over so long, seconds.
    pub balance_duration_s: u64,
    /// Time between two looks at the load, seconds.
    pub balance_interval_s: u64,
    /// A guest that moved is left alone for so long, seconds.
    pub balance_cool_down_s: u64,
    /// No node is loaded more than this by balancing, percent.
    pub balance_target_limit_percent: u32,
    /// Moves of one run at the most.
    pub balance_max_moves: u32,
    /// What is over stays on the record for so long after its end, days: migrations,
    /// operations, offers.
    pub retention_days: u64,
    /// Of each of them so many stay at the most.
    pub retention_count: u32,
    /// For so long after the end of a migration its journal is kept, days: only
    /// whoever looks for a fault of Drover's needs it.
    pub journal_retention_days: u64,
}

/// Reads and checks both sections.
///
/// # Errors
/// A key is unknown or its value cannot be; the error names file, line and key.
pub fn read(
    document: &Document,
) -> Result<(ConductorSettings, BTreeMap<HostName, FenceSettings>), ConfigError> {
    let conductor: ConductorSettings = document.section("conductor")?;
    if let Some((key, message)) = conductor.problem() {
        return Err(document.bad_key("conductor", key, &message));
    }
    let fences: BTreeMap<HostName, FenceSettings> = document.section("fence")?;
    for (host, fence) in &fences {
        if let Some((key, message)) = fence.problem() {
            return Err(document.bad_key("fence", &format!("{host}.{key}"), &message));
        }
    }
    Ok((conductor, fences))
}

/// How load is balanced.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct BalanceSettings {
    /// Whether it is without being asked.
    pub mode: BalanceMode,
    /// Time between two looks at the load.
    pub interval: Duration,
    /// What balance there is to be, unless the caller says otherwise.
    pub goal: Goal,
}

/// Whether load is balanced without being asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BalanceMode {
    /// Not.
    #[default]
    Off,
    /// It is only told what would be done.
    Shadow,
    /// It is done.
    On,
}

impl BalanceMode {
    /// The mode as a word.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Off => "off",
            Self::Shadow => "shadow",
            Self::On => "on",
        }
    }
}

impl Default for ConductorSettings {
    fn default() -> Self {
        Self {
            speaks: SPEAKS,
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
            auto_evacuate_max_per_hour: 2,
            auto_evacuate_max_per_node: 2,
            max_outbound_per_node: 4,
            max_inbound_per_node: 4,
            max_transfers: 32,
            prepare_ahead: 4,
            max_parallel_per_operation: 8,
            balance_mode: BalanceMode::default(),
            balance_threshold_percent: 20,
            balance_duration_s: 300,
            balance_interval_s: 60,
            balance_cool_down_s: 3600,
            balance_target_limit_percent: 80,
            balance_max_moves: 5,
            retention_days: 90,
            retention_count: 10_000,
            journal_retention_days: 7,
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
                "auto_evacuate_max_per_hour",
                self.auto_evacuate_max_per_hour.into(),
                1,
                100,
            ),
            (
                "auto_evacuate_max_per_node",
                self.auto_evacuate_max_per_node.into(),
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
            .chain(self.operation_bounds())
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
            limits: FenceLimits {
                cloud: self.auto_evacuate_max_per_hour,
                node: self.auto_evacuate_max_per_node,
            },
        }
    }

    fn operation_bounds(&self) -> [(&'static str, u64, u64, u64); 14] {
        let many = |name, value: u32| (name, u64::from(value), 1, 10_000);
        let percent = |name, value: u32| (name, u64::from(value), 1, 100);
        [
            many("max_outbound_per_node", self.max_outbound_per_node),
            many("max_inbound_per_node", self.max_inbound_per_node),
            many("max_transfers", self.max_transfers),
            ("prepare_ahead", self.prepare_ahead.into(), 0, 1000),
            (
                "max_parallel_per_operation",
                self.max_parallel_per_operation.into(),
                1,
                1000,
            ),
            percent("balance_threshold_percent", self.balance_threshold_percent),
            percent(
                "balance_target_limit_percent",
                self.balance_target_limit_percent,
            ),
            ("balance_duration_s", self.balance_duration_s, 1, 86_400),
            ("balance_interval_s", self.balance_interval_s, 1, 86_400),
            (
                "balance_cool_down_s",
                self.balance_cool_down_s,
                0,
                2_592_000,
            ),
            ("balance_max_moves", self.balance_max_moves.into(), 1, 1000),
            ("retention_days", self.retention_days, 1, 36_500),
            (
                "retention_count",
                self.retention_count.into(),
                100,
                10_000_000,
            ),
            (
                "journal_retention_days",
                self.journal_retention_days,
                0,
                36_500,
            ),
        ]
    }

    /// How long what is over is kept.
    pub fn retention(&self) -> Retention {
        const DAY_MS: u64 = 86_400_000;
        Retention {
            keep_ms: self.retention_days * DAY_MS,
            keep_count: self.retention_count,
            journal_ms: self.journal_retention_days * DAY_MS,
        }
    }

    /// Most moves at one time.
    pub fn limits(&self) -> Limits {
        Limits {
            ahead: self.prepare_ahead,
            outbound: self.max_outbound_per_node,
            inbound: self.max_inbound_per_node,
            cluster: self.max_transfers,
            per_operation: self.max_parallel_per_operation,
        }
    }

    /// How load is balanced.
    pub fn balance(&self) -> BalanceSettings {
        BalanceSettings {
            mode: self.balance_mode,
            interval: Duration::from_secs(self.balance_interval_s),
            goal: Goal {
                threshold_percent: self.balance_threshold_percent,
                cool_down_ms: self.balance_cool_down_s * 1000,
                target_limit_percent: self.balance_target_limit_percent,
                max_moves: self.balance_max_moves as usize,
            },
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
