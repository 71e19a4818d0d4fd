//! Typed calls to the conductor and the agents. Errors come back as
//! [`Trouble`], told for an operator (see [`crate::failure`]).

mod listed;
mod operation;

use std::{sync::Arc, time::Duration};

use drover_model::{
    api::{
        COMPUTE_TOPIC, CONDUCTOR_TOPIC, NAMESPACE, VERSION,
        compute::{self, AgentStatus},
        conductor::{
            AcceptTransfer, ConductorStatus, Definition, ForgetInstance, Instance, InstanceRef,
            ListInstances, ListMigrations, ListOffers, MigrateAnswer, MigrateInstance,
            MigrationRef, Node, NodeRef, Offer, OfferMade, OfferRef, OfferTransfer, ProjectRef,
            ProjectView, RevertMigration, SetNode, SetProject, TransferInstance, WaitMigration,
            method,
        },
    },
    ids::HostName,
    migration::Migration,
    project::Project,
};
use drover_rpc::{
    AmqpTransport, CallOptions, MessagingSettings, RequestContext, RpcClient, Target, Transport,
    transport::{Address, Outgoing},
};
use serde::{Serialize, de::DeserializeOwned};
use serde_json::json;
use tokio::{sync::watch, time::Instant};
use uuid::Uuid;

pub use listed::Listed;

use crate::{
    exit::Trouble,
    failure::{Asked, not_sent, tell},
};

/// How long a question that only needs the conductor's record may take.
pub const QUESTION: Duration = Duration::from_secs(10);
/// How long asking for a migration or a transfer may take: the conductor may ask
/// the nodes first.
pub const ADMISSION: Duration = Duration::from_secs(60);
/// How long asking for a way back with all changes may take: the conductor
/// confirms first, for two minutes at the most, and then admits a migration.
pub const WAY_BACK: Duration = Duration::from_secs(180);
/// How long one wait for a change lasts before it is asked again: also, by half
/// of it longer, until a conductor that died is noticed.
pub const POLL: Duration = Duration::from_secs(3);

/// How long the broker may take to let this command in.
const CONTACT: Duration = Duration::from_secs(5);

/// A client; clones share its connection.
#[derive(Clone)]
pub struct Client {
    rpc: RpcClient,
    transport: Arc<dyn Transport>,
    context: RequestContext,
    broker: String,
    /// Why the broker did not let us in, once that is known.
    shut_out: watch::Receiver<Option<Trouble>>,
}

impl Client {
    /// A client of the broker that the settings name. Connects at once.
    ///
    /// # Errors
    /// The settings cannot work.
    pub fn connect(settings: &MessagingSettings) -> Result<Self, Trouble> {
        let transport = AmqpTransport::new(settings);
        let transport = transport.map_err(|error| Trouble::usage(error.to_string()))?;
        let broker = settings.url.to_string();
        let (told, shut_out) = watch::channel(None);
        tokio::spawn(knock(transport.clone(), broker.clone(), told));
        Ok(Self {
            shut_out,
            ..Self::new(transport, settings, broker)
        })
    }

    /// A client on a transport; `broker` says in words where that leads.
    pub fn new(
        transport: Arc<dyn Transport>,
        settings: &MessagingSettings,
        broker: impl Into<String>,
    ) -> Self {
        let context = RequestContext::service(format!("req-{}", Uuid::new_v4()));
        let context = match operator() {
            Some(name) => context.with("user_id", name),
            None => context,
        };
        Self {
            rpc: RpcClient::new(transport.clone(), settings),
            transport,
            context,
            broker: broker.into(),
            shut_out: watch::channel(None).1,
        }
    }

    /// Where it talks to, without the password.
    pub fn broker(&self) -> &str {
        &self.broker
    }

    /// All nodes.
    pub async fn list_nodes(&self) -> Result<Vec<Node>, Trouble> {
        self.ask(method::LIST_NODES, &json!({})).await
    }

    /// One node.
    pub async fn get_node(&self, host: &HostName) -> Result<Node, Trouble> {
        self.ask(method::GET_NODE, &NodeRef { host: host.clone() })
            .await
    }

    /// Opens or closes a node.
    pub async fn set_node(&self, request: &SetNode) -> Result<Node, Trouble> {
        self.ask(method::SET_NODE, request).await
    }

    /// Instances.
    pub async fn list_instances(&self, which: &ListInstances) -> Result<Vec<Instance>, Trouble> {
        self.ask(method::LIST_INSTANCES, which).await
    }

    /// One instance.
    pub async fn get_instance(&self, id: &str) -> Result<Instance, Trouble> {
        let instance = id.to_owned();
        self.ask(method::GET_INSTANCE, &InstanceRef { instance })
            .await
    }

    /// How an instance was defined last.
    pub async fn get_kept_definition(&self, id: &str) -> Result<Definition, Trouble> {
        let instance = id.to_owned();
        self.ask(method::GET_KEPT_DEFINITION, &InstanceRef { instance })
            .await
    }

    /// Takes an instance that was lost with its node from the record.
    pub async fn forget_instance(&self, request: &ForgetInstance) -> Result<(), Trouble> {
        let _: Option<()> = self.ask(method::FORGET_INSTANCE, request).await?;
        Ok(())
    }

    /// Asks for a migration, or for its plan.
    pub async fn migrate(
        &self,
        request: &MigrateInstance,
        timeout: Duration,
    ) -> Result<MigrateAnswer, Trouble> {
        self.ask_for(method::MIGRATE_INSTANCE, request, timeout)
            .await
    }

    /// Asks for a transfer to another project, for both sides, or for its plan.
    pub async fn transfer(
        &self,
        request: &TransferInstance,
        timeout: Duration,
    ) -> Result<MigrateAnswer, Trouble> {
        self.ask_for(method::TRANSFER_INSTANCE, request, timeout)
            .await
    }

    /// Offers an instance to another project.
    pub async fn offer(&self, request: &OfferTransfer) -> Result<OfferMade, Trouble> {
        self.ask(method::OFFER_TRANSFER, request).await
    }

    /// Accepts an offer, or asks for the plan of what would come of it.
    pub async fn accept(
        &self,
        request: &AcceptTransfer,
        timeout: Duration,
    ) -> Result<MigrateAnswer, Trouble> {
        self.ask_for(method::ACCEPT_TRANSFER, request, timeout)
            .await
    }

    /// Takes an offer back.
    pub async fn withdraw(&self, offer: &str) -> Result<Offer, Trouble> {
        let offer = offer.to_owned();
        self.ask(method::WITHDRAW_TRANSFER, &OfferRef { offer })
            .await
    }

    /// Offers, newest first.
    pub async fn list_offers(&self, which: &ListOffers) -> Result<Vec<Offer>, Trouble> {
        self.ask(method::LIST_TRANSFERS, which).await
    }

    /// One offer.
    pub async fn get_offer(&self, offer: &str) -> Result<Offer, Trouble> {
        let offer = offer.to_owned();
        self.ask(method::GET_TRANSFER, &OfferRef { offer }).await
    }

    /// All projects, by id.
    pub async fn list_projects(&self) -> Result<Vec<ProjectView>, Trouble> {
        self.ask(method::LIST_PROJECTS, &json!({})).await
    }

    /// One project.
    pub async fn get_project(&self, project: &str) -> Result<ProjectView, Trouble> {
        let project = project.to_owned();
        self.ask(method::GET_PROJECT, &ProjectRef { project }).await
    }

    /// Makes a project.
    pub async fn create_project(&self, project: &Project) -> Result<ProjectView, Trouble> {
        self.ask(method::CREATE_PROJECT, project).await
    }

    /// Changes a project.
    pub async fn set_project(&self, request: &SetProject) -> Result<ProjectView, Trouble> {
        self.ask(method::SET_PROJECT, request).await
    }

    /// Migrations, newest first.
    pub async fn list_migrations(
        &self,
        which: &ListMigrations,
    ) -> Result<Listed<Migration>, Trouble> {
        self.ask(method::LIST_MIGRATIONS, which).await
    }

    /// One migration.
    pub async fn get_migration(&self, id: &str) -> Result<Migration, Trouble> {
        self.steer(method::GET_MIGRATION, id).await
    }

    /// One of the methods that take a migration and answer with its record.
    pub async fn steer(&self, method: &'static str, id: &str) -> Result<Migration, Trouble> {
        let migration = id.to_owned();
        self.ask(method, &MigrationRef { migration }).await
    }

    /// Takes a guest back from where a cold migration brought it. Answered with
    /// the record that is to be followed.
    pub async fn revert(
        &self,
        request: &RevertMigration,
        timeout: Duration,
    ) -> Result<Migration, Trouble> {
        self.ask_for(method::REVERT_MIGRATION, request, timeout)
            .await
    }

    /// A migration's record once it is newer than `seen`, or as it is after [`POLL`].
    pub async fn wait_migration(&self, seen: &Migration) -> Result<Migration, Trouble> {
        let request = WaitMigration {
            migration: seen.uuid.to_string(),
            seen_version: seen.version,
            timeout_ms: u64::try_from(POLL.as_millis()).unwrap_or(u64::MAX),
        };
        self.ask_for(method::WAIT_MIGRATION, &request, POLL + POLL / 2)
            .await
    }

    /// How the conductor is.
    pub async fn conductor_status(&self) -> Result<ConductorStatus, Trouble> {
        self.ask(method::GET_STATUS, &json!({})).await
    }

    /// How an agent is, asked of itself.
    pub async fn agent_status(
        &self,
        host: &HostName,
        timeout: Duration,
    ) -> Result<AgentStatus, Trouble> {
        let target = Target::topic(COMPUTE_TOPIC).server(host.as_str());
        self.call(target, compute::method::GET_STATUS, &json!({}), timeout)
            .await
    }

    /// Ends the connection, removing what only this process used.
    pub async fn close(&self) {
        self.rpc.close().await;
        self.transport.close().await;
    }

    async fn ask<A, R>(&self, method: &'static str, args: &A) -> Result<R, Trouble>
    where
        A: Serialize + Sync,
        R: DeserializeOwned,
    {
        self.ask_for(method, args, QUESTION).await
    }

    async fn ask_for<A, R>(
        &self,
        method: &'static str,
        args: &A,
        timeout: Duration,
    ) -> Result<R, Trouble>
    where
        A: Serialize + Sync,
        R: DeserializeOwned,
    {
        self.call(Target::topic(CONDUCTOR_TOPIC), method, args, timeout)
            .await
    }

    async fn call<A, R>(
        &self,
        target: Target,
        method: &'static str,
        args: &A,
        timeout: Duration,
    ) -> Result<R, Trouble>
    where
        A: Serialize + Sync,
        R: DeserializeOwned,
    {
        let whom = target.to_string();
        let target = target.namespace(NAMESPACE).version(VERSION);
        let options = CallOptions {
            timeout: Some(timeout),
            // Nobody there is known at once, not after the timeout.
            mandatory: true,
            ..CallOptions::default()
        };
        let answer = self
            .rpc
            .call_with(&target, &self.context, method, args, options);
        let asked = Asked {
            whom: &whom,
            broker: &self.broker,
        };
        tokio::select! {
            biased;
            answer = answer => answer.map_err(|error| tell(&error, &asked)),
            trouble = self.shut_out() => Err(trouble),
        }
    }

    async fn shut_out(&self) -> Trouble {
        let mut shut_out = self.shut_out.clone();
        let told = shut_out.wait_for(Option::is_some).await;
        match told.ok().and_then(|trouble| trouble.clone()) {
            Some(trouble) => trouble,
            // Nobody will tell: we are in.
            None => std::future::pending().await,
        }
    }
}

/// Sends the broker a message for nobody, which it drops: that makes the
/// connection for requests while the first call still makes the one for
/// answers, and tells why it cannot be made.
async fn knock(
    transport: Arc<dyn Transport>,
    broker: String,
    told: watch::Sender<Option<Trouble>>,
) {
    let nobody = Address::Reply {
        queue: format!("reply_{}", Uuid::new_v4().simple()),
    };
    let message = Outgoing {
        body: b"{}".to_vec().into(),
        ..Outgoing::default()
    };
    let sent = transport
        .send(&nobody, &message, Instant::now() + CONTACT)
        .await;
    if let Err(error) = sent {
        let asked = Asked {
            whom: "the broker",
            broker: &broker,
        };
        told.send_replace(Some(not_sent(&error, &asked)));
    }
}

/// Who types, for the record of what they asked.
fn operator() -> Option<String> {
    let names = ["SUDO_USER", "USER", "LOGNAME"];
    let name = names.iter().find_map(|name| std::env::var(name).ok())?;
    (!name.is_empty()).then_some(name)
}
