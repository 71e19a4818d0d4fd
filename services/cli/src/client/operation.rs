//! Calls about operations on nodes.

use std::time::Duration;

use drover_model::{
    api::conductor::{
        Automation, EvacuateNode, EvidenceAnswer, ForceDown, ForgetNode, ListOperations, Node,
        OperationAnswer, OperationRef, OperationView, SetAutomation, WaitOperation, method,
    },
    operation::Operation,
};
use serde::Serialize;

use super::{ADMISSION, Client, Listed};
use crate::exit::Trouble;

/// How long one wait for a change of an operation or its migrations lasts: a
/// display of them is never older.
const TICK: Duration = Duration::from_secs(1);
/// After how long without an answer to such a wait it is asked again.
const TICK_PATIENCE: Duration = Duration::from_secs(4);

impl Client {
    /// One of the methods that begin an operation or plan it.
    pub async fn operate(
        &self,
        method: &'static str,
        request: &(impl Serialize + Sync),
        timeout: Duration,
    ) -> Result<OperationAnswer, Trouble> {
        self.ask_for(method, request, timeout.min(ADMISSION)).await
    }

    /// What is known of a node that may be dead; nothing is done to it.
    pub async fn get_evidence(&self, request: &EvacuateNode) -> Result<EvidenceAnswer, Trouble> {
        self.ask_for(method::GET_EVIDENCE, request, ADMISSION).await
    }

    /// Operations, newest first.
    pub async fn list_operations(
        &self,
        which: &ListOperations,
    ) -> Result<Listed<Operation>, Trouble> {
        self.ask(method::LIST_OPERATIONS, which).await
    }

    /// One operation, with its migrations that are under way.
    pub async fn get_operation(&self, id: &str) -> Result<OperationView, Trouble> {
        let operation = id.to_owned();
        self.ask(method::GET_OPERATION, &OperationRef { operation })
            .await
    }

    /// Calls an operation off.
    pub async fn cancel_operation(&self, id: &str) -> Result<OperationView, Trouble> {
        let operation = id.to_owned();
        self.ask(method::CANCEL_OPERATION, &OperationRef { operation })
            .await
    }

    /// An operation once it or a migration of it has changed, or as it is after
    /// a second.
    pub async fn wait_operation(&self, seen: &Operation) -> Result<OperationView, Trouble> {
        let request = WaitOperation {
            operation: seen.uuid.to_string(),
            seen_version: seen.version,
            timeout_ms: u64::try_from(TICK.as_millis()).unwrap_or(u64::MAX),
        };
        self.ask_for(method::WAIT_OPERATION, &request, TICK_PATIENCE)
            .await
    }

    /// Declares a node down, or takes that back.
    pub async fn force_down(&self, request: &ForceDown) -> Result<Node, Trouble> {
        self.ask(method::FORCE_DOWN, request).await
    }

    /// Ends a node that was scrapped.
    pub async fn forget_node(&self, request: &ForgetNode) -> Result<(), Trouble> {
        let _: Option<()> = self.ask(method::FORGET_NODE, request).await?;
        Ok(())
    }

    /// What the conductor does by itself, changed or as it is.
    pub async fn set_automation(&self, request: &SetAutomation) -> Result<Automation, Trouble> {
        self.ask(method::SET_AUTOMATION, request).await
    }
}
