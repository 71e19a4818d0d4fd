//! A conductor that only listens.

use std::sync::{
    Arc, Mutex,
    atomic::{AtomicU64, Ordering},
};

use async_trait::async_trait;
use drover_model::{
    api::{
        NAMESPACE, SPEAKS,
        conductor::{
            EvacuatedAnswer, EvacuatedRemoved, Heartbeat, ListEvacuated, MigrationReport,
            Registered, Word,
        },
    },
    ids::{InstanceId, MigrationId},
    node::NodeReport,
};
use drover_rpc::{Endpoint, RemoteFailure, Request};
use serde_json::Value;
use tokio::time::Instant;

/// What the conductor was told and asked.
#[derive(Default)]
pub(crate) struct Heard {
    pub(crate) registered: AtomicU64,
    pub(crate) beats: Mutex<Vec<Heartbeat>>,
    pub(crate) nodes: Mutex<Vec<NodeReport>>,
    pub(crate) migrations: Mutex<Vec<(Instant, MigrationReport)>>,
    pub(crate) wishes: Mutex<Vec<(String, Value)>>,
    /// What `list_migrations` answers.
    pub(crate) listed: Mutex<Value>,
    /// What `list_evacuated` answers; an error, if none.
    pub(crate) evacuated: Mutex<Option<EvacuatedAnswer>>,
    /// Guests that were to be started at boot when it was asked last.
    pub(crate) starting: Mutex<Vec<InstanceId>>,
    /// Evacuations of which it was told that the old copy is gone.
    pub(crate) removed: Mutex<Vec<MigrationId>>,
}

pub(crate) struct Listener(pub(crate) Arc<Heard>);

#[async_trait]
impl Endpoint for Listener {
    fn namespace(&self) -> Option<&str> {
        Some(NAMESPACE)
    }

    fn methods(&self) -> &[&str] {
        &[
            "register_agent",
            "heartbeat",
            "agent_leaves",
            "report_state",
            "migration_progress",
            "abort_migration",
            "force_complete_migration",
            "list_migrations",
            "list_evacuated",
            "evacuated_removed",
        ]
    }

    async fn handle(&self, request: Request) -> Result<Value, RemoteFailure> {
        match request.method() {
            "register_agent" => {
                let registered = self.0.registered.fetch_add(1, Ordering::Relaxed) + 1;
                let answer = Registered::Admitted {
                    incarnation: registered,
                    speaks: SPEAKS.into(),
                };
                return Ok(serde_json::to_value(answer).unwrap());
            }
            "heartbeat" => {
                self.0.beats.lock().unwrap().push(request.args()?);
                return Ok(serde_json::to_value(Word::Taken).unwrap());
            }
            "agent_leaves" => {}
            "report_state" => {
                self.0.nodes.lock().unwrap().push(request.args()?);
                return Ok(serde_json::to_value(Word::Taken).unwrap());
            }
            "migration_progress" => {
                let report = (Instant::now(), request.args()?);
                self.0.migrations.lock().unwrap().push(report);
            }
            "list_evacuated" => {
                let asked: ListEvacuated = request.args()?;
                *self.0.starting.lock().unwrap() = asked.starting;
                let answer = self.0.evacuated.lock().unwrap().clone();
                let answer = answer.ok_or_else(|| RemoteFailure::runtime_error("not yet"))?;
                return Ok(serde_json::to_value(answer).unwrap());
            }
            "evacuated_removed" => {
                let told: EvacuatedRemoved = request.args()?;
                self.0.removed.lock().unwrap().push(told.migration);
            }
            "list_migrations" => return Ok(self.0.listed.lock().unwrap().clone()),
            other => {
                let wish = (other.to_owned(), request.args()?);
                self.0.wishes.lock().unwrap().push(wish);
            }
        }
        Ok(Value::Null)
    }
}
