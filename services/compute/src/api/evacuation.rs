//! What is asked of a node about dead ones, and about its own death to come.

use drover_model::{
    api::{
        compute::{
            Active, Contents, DirtyRate, FindActive, GetContents, InstanceOnNode, ProbeAddress,
            ProbeAnswer, method,
        },
        fault::Fault,
    },
    guest::Presence,
};
use drover_rpc::{RemoteFailure, Request};
use serde_json::Value;

use super::{Steps, answer};
use crate::faults;

/// Files of one guest. A virtual machine has far fewer.
const MOST_FILES: usize = 1024;

impl Steps {
    /// Past whatever a migration's actor is doing: long files are asked for again
    /// and again.
    async fn contents(&self, which: &GetContents) -> Result<Contents, Fault> {
        if which.paths.len() > MOST_FILES {
            return Err(Fault::refused(format!("more than {MOST_FILES} files")));
        }
        let files = self.node.hypervisor.digests(&which.paths).await;
        let files = files.map_err(faults::hypervisor)?;
        Ok(Contents { files })
    }

    async fn active_of(&self, which: &FindActive) -> Result<Active, Fault> {
        let mut active = Vec::new();
        for guest in &which.instances {
            let presence = self.node.hypervisor.presence(*guest).await;
            let presence = presence.map_err(faults::hypervisor)?;
            if presence.is_active() || presence == Presence::Incoming {
                active.push(*guest);
            }
        }
        Ok(Active { active })
    }

    /// Questions that are of no migration.
    pub(super) async fn serve_question(&self, request: &Request) -> Result<Value, RemoteFailure> {
        let hypervisor = &self.node.hypervisor;
        match request.method() {
            method::GET_DEFINITION => {
                let which: InstanceOnNode = request.args()?;
                let kept = hypervisor.kept_definition(which.instance).await;
                answer(kept.map_err(faults::hypervisor))
            }
            method::MEASURE_DIRTY_RATE => {
                let which: InstanceOnNode = request.args()?;
                let rate = hypervisor.dirty_rate(which.instance).await;
                let rate = rate.map(|mib_s| DirtyRate { mib_s });
                answer(rate.map_err(faults::hypervisor))
            }
            method::PROBE_ADDRESS => {
                let which: ProbeAddress = request.args()?;
                let reached = hypervisor.reach(&which.address, which.port).await;
                let refused = reached.as_ref().is_err_and(|e| e.refused);
                let reached = reached.map_err(|e| e.message);
                answer(Ok(ProbeAnswer { reached, refused }))
            }
            method::FIND_ACTIVE => answer(self.active_of(&request.args()?).await),
            method::GET_CONTENTS => {
                let which: GetContents = request.args()?;
                answer(self.contents(&which).await)
            }
            other => {
                let message = format!("'{other}' is listed and not served");
                Err(faults::exception(Fault::bug(message)))
            }
        }
    }
}
