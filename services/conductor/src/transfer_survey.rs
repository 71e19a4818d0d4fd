//! A survey before a transfer to another project: asks the record and the node,
//! and has [`checks`] judge what they say. A dry run is a survey; so is the
//! first step of a transfer.

use drover_model::{
    api::compute::{CheckTransfer, TransferPlan},
    check::{CheckFailure, Side},
    guest::Guest,
    ids::MigrationId,
    migration::{ProjectTransfer, Way},
    project::Project,
};
use drover_store::{Store, StoreError, instances::InstanceRow, nodes::NodeRow};

use crate::{
    agent_client::AgentClient,
    checks::{
        self, Liveness,
        transfer::{self, Hands},
    },
};

/// What is to be looked into.
pub struct TransferSurvey<'a> {
    /// The record.
    pub store: &'a Store,
    /// The agents.
    pub agents: &'a AgentClient,
    /// What counts as down, and the time.
    pub live: Liveness,
    /// Keys what the plan makes up.
    pub migration: MigrationId,
    /// What is to change hands.
    pub instance: &'a InstanceRow,
    /// To whom, and how.
    pub transfer: &'a ProjectTransfer,
}

/// What came of it.
#[derive(Debug, Clone, PartialEq)]
pub struct Examined {
    /// The guest as it is now, if the node could be asked.
    pub guest: Option<Guest>,
    /// What would change, if nothing stands in the way.
    pub plan: Option<TransferPlan>,
    /// What that means, in words.
    pub words: Vec<String>,
    /// Every reason why not.
    pub failures: Vec<CheckFailure>,
}

impl TransferSurvey<'_> {
    /// What the record alone has against it.
    pub async fn record(&self) -> drover_store::Result<Vec<CheckFailure>> {
        let receiver = self.receiver().await?;
        let node = self.node().await?;
        self.against(receiver.as_ref(), node.as_ref()).await
    }

    async fn against(
        &self,
        receiver: Option<&Project>,
        node: Option<&NodeRow>,
    ) -> drover_store::Result<Vec<CheckFailure>> {
        let host = &self.instance.host;
        let project = self.transfer.project.as_str();
        let mut others = self.store.instances(None, Some(project)).await?;
        others.extend(self.store.instances(Some(host), None).await?);
        let mut failures = checks::node(host, node, Side::Source, self.live);
        failures.extend(transfer::receiver(
            self.instance,
            self.transfer,
            receiver,
            &others,
        ));
        if let Some(project) = receiver {
            failures.extend(self.quota_left(project).await?);
        }
        Ok(failures)
    }

    /// Every check, and the plan.
    pub async fn examine(&self) -> drover_store::Result<Examined> {
        let receiver = self.receiver().await?;
        let node = self.node().await?;
        let mut examined = Examined {
            guest: None,
            plan: None,
            words: Vec::new(),
            failures: self.against(receiver.as_ref(), node.as_ref()).await?,
        };
        let node_is_up = node
            .is_some_and(|node| self.live.is_up(&node) && crate::survey::hypervisor_is_up(&node));
        let (Some(receiver), true) = (receiver, node_is_up) else {
            return Ok(examined);
        };
        let giver = self.project(&self.instance.project).await?;
        let host = &self.instance.host;
        let hands = Hands {
            migration: self.migration,
            host,
            giver: giver.as_ref(),
            receiver: &receiver,
            options: &self.transfer.options,
        };
        let (networks, locations) = transfer::questions(hands);
        let ask = CheckTransfer {
            migration: self.migration,
            instance: self.instance.id,
            networks,
            locations,
        };
        match self.agents.ask(host, &ask).await {
            Ok(facts) => {
                let judged = transfer::judge(hands, &facts);
                examined.failures.extend(judged.failures);
                let way = Way::Transfer(self.transfer.clone());
                let state = facts.guest.as_ref().map(|guest| guest.power_state);
                examined
                    .failures
                    .extend(state.and_then(|state| checks::state(state, &way)));
                examined.guest = facts.guest;
                examined.plan = judged.plan;
                examined.words = judged.words;
            }
            Err(error) => {
                let silent = checks::unanswered(host, Side::Source, &error);
                examined.failures.push(silent);
            }
        }
        Ok(examined)
    }

    /// What the receiver's quota has against it, not counting what this very
    /// transfer was promised before.
    async fn quota_left(&self, project: &Project) -> drover_store::Result<Vec<CheckFailure>> {
        let view = self.store.project_view(project.id.as_str()).await?;
        let claims = self.store.quota_claims().await?;
        let mine = claims
            .into_iter()
            .find(|(id, ..)| *id == self.migration.to_string());
        if mine.is_some() {
            return Ok(Vec::new());
        }
        let used = view.usage.plus(view.promised);
        let short = project
            .quota
            .shortfalls(&used, &transfer::usage_of(self.instance));
        Ok(transfer::quota(&project.id, &short))
    }

    async fn receiver(&self) -> drover_store::Result<Option<Project>> {
        self.project(self.transfer.project.as_str()).await
    }

    async fn project(&self, id: &str) -> drover_store::Result<Option<Project>> {
        match self.store.find_project(id).await {
            Ok(project) if project.id.as_str() == id => Ok(Some(project)),
            Ok(_) | Err(StoreError::NotFound(_) | StoreError::Ambiguous(_)) => Ok(None),
            Err(error) => Err(error),
        }
    }

    async fn node(&self) -> drover_store::Result<Option<NodeRow>> {
        match self.store.node(&self.instance.host).await {
            Ok(row) => Ok(Some(row)),
            Err(StoreError::NotFound(_)) => Ok(None),
            Err(error) => Err(error),
        }
    }
}
