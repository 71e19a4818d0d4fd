//! What an evacuation needs before a guest may start elsewhere (invariant 1):
//! evidence, a fence that says *off*, and definitions.

use std::time::Duration;

use drover_model::{
    api::compute::{CheckEvacuation, EvacuationFacts, KeptDefinition, ProbeAddress},
    check::{CheckFailure, Side},
    content::CheckedFile,
    ids::{HostName, MigrationId},
    migration::{ProofOfDeath, Requester},
    node::Endpoint,
    operation::{EvacuateOptions, Evidence, FenceAnswer, MoveWay, Reach},
};
use drover_store::{instances::InstanceRow, nodes::NodeRow};
use futures_util::{FutureExt, StreamExt, future::join_all, stream};

use super::evidence::{count, judge, verdict};
use crate::{
    app::Context,
    checks::{self, content::Both},
    comparing::{self, Patience},
    plan::{Examination, Examinations},
};

/// Nodes that try to reach the one in question, and nodes that are asked about a
/// guest.
const MOST_ASKED: usize = 16;
/// Questions under way at once.
const AT_ONCE: usize = 8;
/// How long one of those who try may take.
const PROBE_LIMIT: Duration = Duration::from_secs(5);

/// What is known of a node without doing anything to it, and everything that
/// stands in the way of evacuating it. A fencing agent is only asked for the
/// status: that it can put the node off shows when it does.
///
/// # Errors
/// There is no such node, or the record cannot be read.
pub async fn inspect(
    context: &Context,
    options: &EvacuateOptions,
    requester: &Requester,
) -> drover_store::Result<(Evidence, Vec<CheckFailure>)> {
    let (evidence, _) = collect(context, options, requester).await?;
    let failures = judge(options, &evidence);
    Ok((evidence, failures))
}

/// Makes sure that the node is off, by its fencing agent or by the operator's
/// word; else says why nothing may start elsewhere. Safe to repeat.
///
/// # Errors
/// There is no such node, or the record cannot be read.
pub async fn prove(
    context: &Context,
    options: &EvacuateOptions,
    requester: &Requester,
) -> drover_store::Result<(Evidence, Result<ProofOfDeath, Vec<CheckFailure>>)> {
    let (mut evidence, node) = collect(context, options, requester).await?;
    let failures = judge(options, &evidence);
    if !failures.is_empty() {
        return Ok((evidence, Err(failures)));
    }
    if evidence.fence != FenceAnswer::NotConfigured {
        let host = &options.host;
        evidence.fence = context.fences.off(host, &context.clock).await;
        let put_off = matches!(evidence.fence, FenceAnswer::Off { .. });
        // Signs of life from before say nothing any more. That there are none
        // now need not be seen again, and would only cost time.
        if put_off && shows_life(&evidence) {
            let nodes = context.store.nodes().await?;
            let (reach, agent) = signs(context, &node, &nodes).await;
            (evidence.reach, evidence.agent) = (reach, Some(agent));
        }
    }
    let proof = verdict(options, &evidence);
    Ok((evidence, proof))
}

fn shows_life(evidence: &Evidence) -> bool {
    let answers = evidence.agent.as_ref().is_some_and(Result::is_ok);
    answers || evidence.reach.iter().any(|r| r.libvirt.is_ok())
}

async fn collect(
    context: &Context,
    options: &EvacuateOptions,
    requester: &Requester,
) -> drover_store::Result<(Evidence, NodeRow)> {
    let host = &options.host;
    let node = context.store.node(host).await?;
    let nodes = context.store.nodes().await?;
    let live = context.liveness();
    let (nodes_expected, nodes_silent) = count(&nodes, host, live);
    let (queue_consumers, fence, (reach, agent)) = tokio::join!(
        context.agents.consumers(host, PROBE_LIMIT),
        context.fences.status(host, &context.clock),
        signs(context, &node, &nodes),
    );
    let evidence = Evidence {
        at_ms: context.clock.now_ms(),
        silent_ms: live.now_ms.saturating_sub(node.heard_at_ms),
        down_after_ms: live.down_after_ms,
        forced_down: node.forced_down,
        queue_consumers,
        reach,
        agent: Some(agent),
        fence,
        confirmed_by: options.confirmed_off.then(|| requester.clone()),
        nodes_expected,
        nodes_silent,
    };
    Ok((evidence, node))
}

/// What other nodes see of a node, and whether its agent answers.
async fn signs(
    context: &Context,
    node: &NodeRow,
    nodes: &[NodeRow],
) -> (Vec<Reach>, Result<(), String>) {
    let host = &node.report.host;
    let live = context.liveness();
    let others = nodes
        .iter()
        .filter(|n| n.report.host != *host && live.is_up(n));
    let endpoint = &node.report.endpoint;
    let probes: Vec<_> = others
        .take(MOST_ASKED)
        .map(|n| probe(context, n.report.host.clone(), endpoint).boxed())
        .collect();
    let probing = join_all(probes);
    let (reach, agent) = tokio::join!(probing, context.agents.answers(host, PROBE_LIMIT));
    (reach, agent.map_err(|e| e.message))
}

async fn probe(context: &Context, from: HostName, endpoint: &Endpoint) -> Reach {
    let ask = ProbeAddress {
        address: endpoint.address.clone(),
        port: endpoint.libvirt_port,
    };
    let answered = context.agents.probe(&from, &ask, PROBE_LIMIT).await;
    let libvirt = match answered {
        Ok(answer) => answer.reached,
        Err(error) => Err(format!("it did not say: {}", error.message)),
    };
    Reach { from, libvirt }
}

/// What the other nodes say to each running guest of the node: which of them
/// cannot have it, and why (its disks are not reached there, …).
///
/// # Errors
/// The record cannot be read.
pub async fn examine(
    context: &Context,
    options: &EvacuateOptions,
) -> drover_store::Result<Examinations> {
    let store = &context.store;
    let guests = store.instances(Some(&options.host), None).await?;
    let wanted = guests.into_iter().filter(|guest| {
        let named = options.only.is_empty() || options.only.contains(&guest.id);
        named && guest.power_state.is_active()
    });
    let candidates = candidates(context, options).await?;
    let mut found = Examinations::new();
    let examining: Vec<_> = wanted
        .map(|guest| examine_guest(context, guest, &candidates).boxed())
        .collect();
    let mut examining = stream::iter(examining).buffer_unordered(AT_ONCE);
    while let Some(examined) = examining.next().await {
        let (guest, examination) = examined?;
        found.insert(guest.id, examination);
    }
    Ok(found)
}

/// Nodes that are asked: those that the record does not rule out.
async fn candidates(
    context: &Context,
    options: &EvacuateOptions,
) -> drover_store::Result<Vec<HostName>> {
    let live = context.liveness();
    let nodes = context.store.nodes().await?;
    let fit = nodes.into_iter().filter(|node| {
        let host = &node.report.host;
        let named = options.to.is_empty() || options.to.contains(host);
        let closed = checks::node(host, Some(node), Side::Destination, live);
        named && *host != options.host && closed.is_empty()
    });
    Ok(fit.map(|n| n.report.host).take(MOST_ASKED).collect())
}

async fn examine_guest(
    context: &Context,
    guest: InstanceRow,
    candidates: &[HostName],
) -> drover_store::Result<(InstanceRow, Examination)> {
    let kept = context.store.kept_definition(guest.id).await?;
    let mut at_source = checks::evacuation::definition(&guest.host, kept.as_ref());
    let mut examination = Examination::default();
    if let Some(row) = kept {
        let migration = MigrationId::generate();
        let mut answers = Vec::new();
        for host in candidates {
            let answer = ask(context, migration, &row.kept, host).await;
            match answer {
                Ok(facts) => {
                    let mut failures = checks::evacuation::destination(&row.kept, &facts, host);
                    let of = (&row.kept, &guest.host);
                    let compared = compare(context, of, (host, &facts), Patience::ForPlan).await;
                    failures.extend(compared.0);
                    if !failures.is_empty() {
                        examination.refuse(MoveWay::Evacuate, host.clone(), failures);
                    }
                    answers.push(facts);
                }
                Err(failure) => {
                    examination.refuse(MoveWay::Evacuate, host.clone(), vec![failure]);
                }
            }
        }
        at_source.extend(checks::evacuation::alone(&row.kept, &answers, &guest.host));
    }
    if !at_source.is_empty() {
        examination.source.insert(MoveWay::Evacuate, at_source);
    }
    Ok((guest, examination))
}

async fn ask(
    context: &Context,
    migration: MigrationId,
    kept: &KeptDefinition,
    host: &HostName,
) -> Result<EvacuationFacts, CheckFailure> {
    let ask = CheckEvacuation {
        migration,
        guest: kept.guest.clone(),
        identities: kept.identities.clone(),
        contents: kept.contents.clone(),
    };
    let answered = context.agents.check_evacuation(host, &ask).await;
    answered.map_err(|e| checks::unanswered(host, Side::Destination, &e.message))
}

/// Compares what a dead node told of the files that a guest only reads with what
/// another has; says what stands in the way, and what was found right.
async fn compare(
    context: &Context,
    (kept, source): (&KeptDefinition, &HostName),
    (host, facts): (&HostName, &EvacuationFacts),
    patience: Patience,
) -> (Vec<CheckFailure>, Vec<CheckedFile>) {
    let both = Both {
        guest: &kept.guest,
        source: (source, &kept.contents),
        dest: (host, &facts.destination.contents),
        brought: &[],
        source_is_dead: true,
    };
    let compared = comparing::complete(&context.agents, both, patience).await;
    let both = compared.view(both);
    let mut failures = match patience {
        Patience::ForPlan => both.known_failures(),
        Patience::Brief | Patience::WhileRead => both.failures(),
    };
    let checked = both.checked().dest;
    failures.extend(compared.failures);
    (failures, checked)
}

/// Every check on one node that may be a guest's new home.
///
/// # Errors
/// The record cannot be read.
pub async fn examine_destination(
    context: &Context,
    migration: MigrationId,
    (kept, source): (&KeptDefinition, &HostName),
    host: &HostName,
) -> drover_store::Result<(Option<NodeRow>, Vec<CheckFailure>, Vec<CheckedFile>)> {
    let row = context.store.known_node(host).await?;
    let live = context.liveness();
    let mut checked = Vec::new();
    let mut failures = checks::node(host, row.as_ref(), Side::Destination, live);
    failures.extend(checks::same_host(source, host));
    if failures.is_empty() {
        match ask(context, migration, kept, host).await {
            Ok(facts) => {
                failures.extend(checks::evacuation::destination(kept, &facts, host));
                let (wrong, right) =
                    compare(context, (kept, source), (host, &facts), Patience::WhileRead).await;
                failures.extend(wrong);
                checked = right;
            }
            Err(failure) => failures.push(failure),
        }
    }
    Ok((row, failures, checked))
}

/// Whether the node of an evacuated guest is still dead, by the record.
///
/// # Errors
/// The record cannot be read.
pub async fn still_dead(
    context: &Context,
    host: &HostName,
    proof: &ProofOfDeath,
) -> drover_store::Result<(Option<NodeRow>, Option<CheckFailure>)> {
    let row = context.store.known_node(host).await?;
    let live = context.liveness();
    let failure = checks::evacuation::evacuated_node(host, row.as_ref(), proof, live);
    Ok((row, failure))
}
