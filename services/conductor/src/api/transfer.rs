//! Transfers to another project: asked for by whoever speaks for both sides, or
//! offered by the giver and accepted, with a key, by the receiver.
//!
//! ```text
//!  offer_transfer ─► open ─┬─ accept_transfer ─► accepted ─┬─ completed ─► accepted for good
//!                    ▲     │                               └─ failed ────► open again
//!                    │     ├─ withdraw_transfer ─► withdrawn
//!                    │     ├─ too late ──────────► expired
//!                    │     ├─ five wrong keys ───► locked
//!                    └─────┘  the instance is gone, or another's ─► void
//! ```

use drover_model::{
    api::conductor::{
        AcceptTransfer, ListOffers, MigrateAnswer, Offer, OfferMade, OfferRef, OfferState,
        OfferTransfer, TransferInstance,
    },
    ids::ProjectId,
    migration::{Consent, EndReason, Migration, ProjectTransfer, Way},
};
use drover_rpc::{RemoteFailure, Request};
use drover_store::{
    StoreError,
    instances::InstanceRow,
    offers::{KeyTried, NewOffer},
};
use tracing::{info, warn};

use super::{DroverEndpoint, failure, failure::store_failure, migrate::requester};
use crate::admission::Wanted;

/// How long an offer stands if its giver says nothing, seconds.
const STANDS_S: u64 = 86_400;
/// How long one may stand, seconds.
const LONGEST_S: u64 = 30 * 86_400;

impl DroverEndpoint {
    /// Both sides at once.
    pub(super) async fn transfer_instance(
        &self,
        request: &Request,
        ask: &TransferInstance,
    ) -> Result<MigrateAnswer, RemoteFailure> {
        let instance = self.instance(&ask.instance).await?;
        let now_ms = self.context.clock.now_ms();
        let by = requester(request.context());
        let consent = Consent {
            offer: None,
            offered_by: by.clone(),
            offered_at_ms: now_ms,
            accepted_by: by,
            accepted_at_ms: now_ms,
        };
        let transfer = ProjectTransfer {
            project: self.receiver(&ask.project).await?,
            options: ask.options.clone(),
        };
        let wanted = wanted(instance, transfer, consent);
        self.transfer_or_plan(request, wanted, ask.dry_run).await
    }

    async fn transfer_or_plan(
        &self,
        request: &Request,
        wanted: Wanted,
        dry_run: bool,
    ) -> Result<MigrateAnswer, RemoteFailure> {
        if dry_run {
            let plan = self.admission().plan(&wanted).await;
            let plan = plan.map_err(|e| store_failure(&e))?;
            return Ok(MigrateAnswer::Plan { plan });
        }
        let migration = Box::new(self.admit(request, wanted).await?);
        Ok(MigrateAnswer::Accepted { migration })
    }

    /// The project that is meant. One that is not there is for the checks to say.
    async fn receiver(&self, reference: &str) -> Result<ProjectId, RemoteFailure> {
        match self.context.store.find_project(reference).await {
            Ok(project) => Ok(project.id),
            Err(StoreError::NotFound(_)) => {
                reference
                    .parse()
                    .map_err(|e: drover_model::ids::BadProjectId| {
                        RemoteFailure::value_error(e.to_string())
                    })
            }
            Err(error) => Err(store_failure(&error)),
        }
    }

    /// The giver's side.
    pub(super) async fn offer_transfer(
        &self,
        request: &Request,
        ask: &OfferTransfer,
    ) -> Result<OfferMade, RemoteFailure> {
        let instance = self.instance(&ask.instance).await?;
        let to_project = match &ask.project {
            Some(reference) => {
                let found = self.context.store.find_project(reference).await;
                Some(found.map_err(|e| store_failure(&e))?.id)
            }
            None => None,
        };
        if to_project
            .as_ref()
            .is_some_and(|to| to.as_str() == instance.project)
        {
            let message = format!(
                "{} is project {}'s already",
                instance.name, instance.project
            );
            return Err(RemoteFailure::value_error(message));
        }
        let stands_s = ask.expires_in_s.unwrap_or(STANDS_S);
        if !(1..=LONGEST_S).contains(&stands_s) {
            let message = format!("expires_in_s is {stands_s}; it may be 1 to {LONGEST_S}");
            return Err(RemoteFailure::value_error(message));
        }
        let now_ms = self.context.clock.now_ms();
        let new = NewOffer {
            instance: &instance,
            to_project,
            offered_by: requester(request.context()),
            now_ms,
            expires_at_ms: now_ms + stands_s * 1000,
        };
        let made = self.context.store.create_offer(&new).await;
        match made.map_err(|e| store_failure(&e))? {
            Ok((offer, key)) => {
                info!(offer = %offer.id, instance = %offer.instance_uuid, "offered");
                let key = key.to_string();
                Ok(OfferMade { offer, key })
            }
            Err(open) => Err(failure::offer_not_open(
                &open,
                "it is offered already: withdraw that offer first",
            )),
        }
    }

    /// The receiver's side.
    pub(super) async fn accept_transfer(
        &self,
        request: &Request,
        ask: &AcceptTransfer,
    ) -> Result<MigrateAnswer, RemoteFailure> {
        if let Some(migration) = self.answered_before(request).await? {
            return Ok(MigrateAnswer::Accepted { migration });
        }
        let project = self.receiver(&ask.project).await?;
        let offer = self.key_fits(ask, &project).await?;
        let instance = self.instance(&offer.instance_uuid.to_string()).await?;
        let consent = Consent {
            offer: Some(offer.id),
            offered_by: offer.offered_by,
            offered_at_ms: offer.created_at_ms,
            accepted_by: requester(request.context()),
            accepted_at_ms: self.context.clock.now_ms(),
        };
        let transfer = ProjectTransfer {
            project,
            options: ask.options.clone(),
        };
        let wanted = wanted(instance, transfer, consent);
        self.transfer_or_plan(request, wanted, ask.dry_run).await
    }

    /// What a request that comes again made the first time.
    async fn answered_before(
        &self,
        request: &Request,
    ) -> Result<Option<Box<Migration>>, RemoteFailure> {
        let Some(unique_id) = request.unique_id() else {
            return Ok(None);
        };
        let found = self.context.store.requested(unique_id).await;
        let found = found.map_err(|e| store_failure(&e))?;
        let refused = |m: &Migration| matches!(m.end_reason, Some(EndReason::Refused { .. }));
        Ok(found.filter(|m| !refused(m)).map(Box::new))
    }

    /// The offer, if it can be accepted by that project with that key.
    async fn key_fits(
        &self,
        ask: &AcceptTransfer,
        project: &ProjectId,
    ) -> Result<Offer, RemoteFailure> {
        let now_ms = self.context.clock.now_ms();
        let store = &self.context.store;
        let offer = store.find_offer(&ask.offer, now_ms).await;
        let offer = offer.map_err(|e| store_failure(&e))?;
        if offer.to_project.as_ref().is_some_and(|to| to != project) {
            let words = format!("it was not offered to project {project}");
            return Err(failure::offer_not_open(&offer, &words));
        }
        let tried = store.try_key(&offer.id.to_string(), &ask.key, now_ms).await;
        match tried.map_err(|e| store_failure(&e))? {
            KeyTried::Right(offer) => Ok(*offer),
            KeyTried::Wrong { offer, left } => {
                warn!(offer = %offer.id, left, "a wrong key was tried");
                Err(failure::wrong_key(&offer, left))
            }
            KeyTried::NotOpen(offer) => {
                Err(failure::offer_not_open(&offer, why_not_open(offer.state)))
            }
        }
    }

    pub(super) async fn withdraw_transfer(&self, ask: &OfferRef) -> Result<Offer, RemoteFailure> {
        let now_ms = self.context.clock.now_ms();
        let withdrawn = self.context.store.withdraw_offer(&ask.offer, now_ms).await;
        withdrawn.map_err(|e| store_failure(&e))
    }

    pub(super) async fn get_transfer(&self, ask: &OfferRef) -> Result<Offer, RemoteFailure> {
        let now_ms = self.context.clock.now_ms();
        let found = self.context.store.find_offer(&ask.offer, now_ms).await;
        found.map_err(|e| store_failure(&e))
    }

    pub(super) async fn list_transfers(
        &self,
        ask: &ListOffers,
    ) -> Result<Vec<Offer>, RemoteFailure> {
        let now_ms = self.context.clock.now_ms();
        let listed = self.context.store.offers(ask, now_ms).await;
        listed.map_err(|e| store_failure(&e))
    }
}

fn wanted(instance: InstanceRow, transfer: ProjectTransfer, consent: Consent) -> Wanted {
    Wanted {
        host: Some(instance.host.clone()),
        instance,
        way: Way::Transfer(transfer),
        consent: Some(consent),
        operation: None,
    }
}

fn why_not_open(state: OfferState) -> &'static str {
    match state {
        OfferState::Open => "it is open",
        OfferState::Accepted => "it was accepted already",
        OfferState::Expired => "its time is over: have it offered again",
        OfferState::Withdrawn => "its giver took it back",
        OfferState::Locked => "too many wrong keys were tried: have it offered again",
        OfferState::Void => "the instance is gone, or another project's by now",
    }
}
