//! What is asked of a node about dead ones, and about its own death to come.

use std::time::Duration;

use drover_model::api::{
    compute::{
        Active, Contents, DirtyRate, FindActive, GetContents, InstanceOnNode, ProbeAddress,
        ProbeAnswer, method,
    },
    fault::Fault,
};
use drover_rpc::{RemoteFailure, Request};
use futures_util::future::join_all;
use serde_json::Value;
use tokio::time::timeout;

use super::Steps;
use crate::faults::{self, answer};

/// How long it is looked for a guest of which somebody waits to hear whether it is active.
const SEEN_WITHIN: Duration = Duration::from_secs(1);
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

    /// Of each at once, and of none for long: a guest that hangs hides no other.
    async fn active_of(&self, which: &FindActive) -> Active {
        let looking = which.instances.iter().map(|guest| async move {
            let presence = self.node.hypervisor.presence(*guest);
            (*guest, timeout(SEEN_WITHIN, presence).await)
        });
        let mut found = Active::default();
        for (guest, presence) in join_all(looking).await {
            match presence {
                Ok(Ok(presence)) if presence.has_qemu() => found.active.push(guest),
                Ok(Ok(_)) => {}
                Ok(Err(_)) | Err(_) => found.unseen.push(guest),
            }
        }
        found
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
            method::FIND_ACTIVE => answer(Ok(self.active_of(&request.args()?).await)),
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
