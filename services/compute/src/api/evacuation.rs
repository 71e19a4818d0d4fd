//! What is asked of a node about dead ones, and about its own death to come; and
//! the gate that a node which was away itself has to pass.

use std::time::Duration;

use drover_model::api::{
    compute::{
        CheckEvacuation, Contents, DirtyRate, GetContents, InstanceOnNode, ProbeAddress,
        ProbeAnswer, RebuildInstance, method,
    },
    fault::Fault,
};
use drover_rpc::{RemoteFailure, Request};
use serde_json::Value;

use super::{Steps, answer};
use crate::{faults, migration::Command};

/// How long a step waits for the conductor to tell what of this node lives
/// elsewhere by now.
const GATE_PATIENCE: Duration = Duration::from_secs(5);
/// Files of one guest. A virtual machine has far fewer.
const MOST_FILES: usize = 1024;

impl Steps {
    /// Refuses, for now, whatever may start a guest before the agent knows which
    /// of its guests live elsewhere (see [`crate::returning`]).
    pub(super) async fn may_serve(&self, method: &str) -> Result<(), Fault> {
        let may_start_one = matches!(
            method,
            method::LIVE_MIGRATION
                | method::RESIZE_INSTANCE
                | method::FINISH_RESIZE
                | method::FINISH_REVERT_RESIZE
                | method::TRANSFER_INSTANCE
                | method::PREP_REBUILD
                | method::REBUILD
        );
        if !may_start_one {
            return Ok(());
        }
        let mut asked = self.node.has_asked.subscribe();
        let passed = asked.wait_for(|asked| *asked);
        match tokio::time::timeout(GATE_PATIENCE, passed).await {
            Ok(_) => Ok(()),
            Err(_) => Err(Fault::not_now(
                "this node has not yet been told which of its guests were evacuated",
            )),
        }
    }

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

    pub(super) async fn serve_evacuation(&self, request: &Request) -> Result<Value, RemoteFailure> {
        use Command as C;
        let (actors, hypervisor) = (&self.registry, &self.node.hypervisor);
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
                answer(Ok(ProbeAnswer { reached }))
            }
            method::GET_CONTENTS => {
                let which: GetContents = request.args()?;
                answer(self.contents(&which).await)
            }
            method::CHECK_EVACUATION => {
                let step: Box<CheckEvacuation> = request.args()?;
                let id = step.migration;
                answer(actors.ask(id, |to| C::CheckEvacuation(step, to)).await)
            }
            _ => {
                let step: Box<RebuildInstance> = request.args()?;
                let id = step.migration;
                answer(actors.ask(id, |to| C::PrepRebuild(step, to)).await)
            }
        }
    }
}
