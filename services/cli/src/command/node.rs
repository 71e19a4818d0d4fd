//! `drover node`: what nodes there are, and whether they take instances.

use drover_model::api::conductor::{Node, SetNode};

use super::Session;
use crate::{
    args::{Change, NodeVerb},
    exit::{Exit, Trouble},
    render::{clean, describe, table},
};

/// Runs a verb.
pub async fn run(session: &mut Session, verb: NodeVerb) -> Result<Exit, Trouble> {
    match verb {
        NodeVerb::List => {
            let nodes = session.client.list_nodes().await?;
            session.screen.value(&nodes, |nodes| table::nodes(nodes))?;
        }
        NodeVerb::Show { host } => {
            let node = session.client.get_node(&host).await?;
            session.screen.value(&node, describe::node)?;
        }
        NodeVerb::Disable {
            host,
            reason,
            change,
        } => {
            set(
                session,
                SetNode {
                    host,
                    enabled: false,
                    reason,
                },
                change,
            )
            .await?;
        }
        NodeVerb::Enable { host, change } => {
            set(
                session,
                SetNode {
                    host,
                    enabled: true,
                    reason: None,
                },
                change,
            )
            .await?;
        }
    }
    Ok(Exit::Done)
}

/// The conductor answers when it is done: there is nothing to wait for.
async fn set(session: &mut Session, request: SetNode, change: Change) -> Result<(), Trouble> {
    if change.dry_run {
        let node = session.client.get_node(&request.host).await?;
        return session
            .screen
            .value(&node, |node| would_be(node, request.enabled));
    }
    let node = session.client.set_node(&request).await?;
    session.screen.value(&node, is_now)
}

fn would_be(node: &Node, enabled: bool) -> String {
    let (host, now) = (&node.host, table::placing(node));
    match (node.enabled == enabled, enabled) {
        (true, _) => format!("{host} is {now} already: nothing would change"),
        (false, true) => format!(
            "{host} would be enabled; it is disabled now{}",
            because(node)
        ),
        (false, false) => format!("{host} would be disabled; it is enabled now"),
    }
}

fn is_now(node: &Node) -> String {
    let host = &node.host;
    match (node.enabled, node.instances.unwrap_or(0)) {
        (true, _) => format!("{host} is enabled"),
        (false, 0) => format!("{host} is disabled{}", because(node)),
        (false, n) => format!(
            "{host} is disabled{}; {n} instances stay on it",
            because(node)
        ),
    }
}

fn because(node: &Node) -> String {
    let reason = node.disabled_reason.as_deref().map(clean);
    reason.map_or_else(String::new, |reason| format!(" ({reason})"))
}
