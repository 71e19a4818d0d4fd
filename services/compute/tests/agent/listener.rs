//! A conductor that only listens.

use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use drover_model::{
    api::{NAMESPACE, conductor::MigrationReport},
    node::NodeReport,
};
use drover_rpc::{Endpoint, RemoteFailure, Request};
use serde_json::Value;
use tokio::time::Instant;

/// What the conductor was told and asked.
#[derive(Default)]
pub(crate) struct Heard {
    pub(crate) nodes: Mutex<Vec<NodeReport>>,
    pub(crate) migrations: Mutex<Vec<(Instant, MigrationReport)>>,
    pub(crate) wishes: Mutex<Vec<(String, Value)>>,
    /// What `list_migrations` answers.
    pub(crate) listed: Mutex<Value>,
}

pub(crate) struct Listener(pub(crate) Arc<Heard>);

#[async_trait]
impl Endpoint for Listener {
    fn namespace(&self) -> Option<&str> {
        Some(NAMESPACE)
    }

    fn methods(&self) -> &[&str] {
        &[
            "report_state",
            "migration_progress",
            "abort_migration",
            "force_complete_migration",
            "list_migrations",
        ]
    }

    async fn handle(&self, request: Request) -> Result<Value, RemoteFailure> {
        match request.method() {
            "report_state" => self.0.nodes.lock().unwrap().push(request.args()?),
            "migration_progress" => {
                let report = (Instant::now(), request.args()?);
                self.0.migrations.lock().unwrap().push(report);
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
