//! `drover doctor`: asks everything that can be asked, in the order in which one
//! thing needs the other, and leaves the judgement to [`judge`].

pub mod judge;

use std::{sync::Arc, time::Duration};

use drover_model::{
    api::conductor::{ListInstances, ListMigrations, ListOperations, Node, SetAutomation},
    ids::HostName,
};
use drover_runtime::clock::now_ms;
use tokio::{sync::Semaphore, task::JoinSet, time::Instant};

use self::judge::{AgentAnswer, Answer, Diagnosis, Finding, Level};
use crate::{
    args::DoctorArgs,
    client::Client,
    exit::{Exit, Place, Trouble},
    render::{clean, screen::Screen},
};

/// Agents that are asked at the same time.
const AT_ONCE: usize = 16;

/// Where the configuration came from, and whom it leads to.
pub struct Setup {
    /// In words.
    pub source: String,
    /// Whom to ask.
    pub client: Client,
}

/// Examines and tells.
pub async fn run(
    screen: &mut Screen,
    setup: Result<Setup, Trouble>,
    args: DoctorArgs,
) -> Result<Exit, Trouble> {
    let timeout = Duration::from_secs(args.agent_timeout);
    let diagnosis = Diagnosis::from(examine(setup, timeout).await);
    screen.value(&diagnosis, text)?;
    Ok(if diagnosis.healthy {
        Exit::Done
    } else {
        Exit::Failed
    })
}

async fn examine(setup: Result<Setup, Trouble>, timeout: Duration) -> Vec<Finding> {
    let Setup { source, client } = match setup {
        Ok(setup) => setup,
        Err(trouble) => return vec![Finding::trouble("config", "readable", &trouble)],
    };
    let mut findings = vec![Finding::ok("config", "readable", source)];
    let conductor = timed(client.conductor_status(), |status| status.clock_ms).await;
    findings.push(match &conductor {
        Err(trouble) if trouble.place == Place::Broker => {
            Finding::trouble("broker", "login", trouble)
        }
        _ => Finding::ok("broker", "login", format!("{} lets us in", client.broker())),
    });
    let conductor = match conductor {
        Ok(conductor) => conductor,
        Err(trouble) if trouble.place == Place::Broker => return findings,
        Err(trouble) => {
            findings.push(no_conductor(&trouble));
            return findings;
        }
    };
    // The first answer took the time of connecting; clocks want one that did not.
    let again = timed(client.conductor_status(), |status| status.clock_ms).await;
    let conductor = again.unwrap_or(conductor);
    findings.extend(judge::conductor(&conductor));
    let active = ListMigrations {
        active: true,
        ..ListMigrations::default()
    };
    let (nodes, active) = tokio::join!(client.list_nodes(), client.list_migrations(&active));
    match nodes {
        Ok(nodes) => {
            let agents = ask_agents(&client, &nodes, timeout).await;
            for (node, agent) in nodes.iter().zip(&agents) {
                findings.extend(judge::node(node, agent, &conductor));
            }
            findings.extend(judge::together(&nodes));
        }
        Err(trouble) => findings.push(Finding::trouble("nodes", "list", &trouble)),
    }
    match active {
        Ok(active) => {
            findings.extend(judge::migrations(active.known()));
            findings.extend(judge::newer("migrations", active.newer()));
        }
        Err(trouble) => findings.push(Finding::trouble("migrations", "list", &trouble)),
    }
    match client.list_instances(&ListInstances::default()).await {
        Ok(instances) => {
            findings.extend(judge::copies(&instances));
            findings.extend(judge::lost(&instances));
        }
        Err(trouble) => findings.push(Finding::trouble("instances", "list", &trouble)),
    }
    findings.extend(operations(&client, conductor.said.clock_ms).await);
    findings
}

/// What is done with whole nodes, and what of that by itself.
async fn operations(client: &Client, now_ms: u64) -> Vec<Finding> {
    let which = ListOperations {
        active: true,
        ..ListOperations::default()
    };
    // Nothing is set: it tells how it is.
    let nothing = SetAutomation::default();
    let (active, automation) = tokio::join!(
        client.list_operations(&which),
        client.set_automation(&nothing)
    );
    let mut findings = match active {
        Ok(active) => {
            let mut findings = judge::operations(active.known(), now_ms);
            findings.extend(judge::newer("operations", active.newer()));
            findings
        }
        Err(trouble) => vec![Finding::trouble("operations", "list", &trouble)],
    };
    match automation {
        Ok(now) => findings.extend(judge::automation(&now)),
        Err(trouble) => findings.push(Finding::trouble("automation", "state", &trouble)),
    }
    findings
}

fn no_conductor(trouble: &Trouble) -> Finding {
    let finding = Finding::trouble("conductor", "answers", trouble);
    let remedy = finding.remedy.clone().unwrap_or_else(|| {
        "see that drover-conductor runs and what its log says; a queue is there, nobody answers"
            .to_owned()
    });
    Finding {
        remedy: Some(remedy),
        ..finding
    }
}

/// An answer with its time, and the far clock against the middle of it.
async fn timed<T>(
    call: impl Future<Output = Result<T, Trouble>>,
    clock_ms: impl FnOnce(&T) -> u64,
) -> Result<Answer<T>, Trouble> {
    let (before_ms, asked) = (now_ms(), Instant::now());
    let said = call.await?;
    let took_ms = u64::try_from(asked.elapsed().as_millis()).unwrap_or(u64::MAX);
    let middle_ms = before_ms.saturating_add(took_ms / 2);
    let signed = |ms: u64| i64::try_from(ms).unwrap_or(i64::MAX);
    let offset_ms = signed(clock_ms(&said)).saturating_sub(signed(middle_ms));
    Ok(Answer {
        said,
        took_ms,
        offset_ms,
    })
}

/// Every agent's own answer, in the nodes' order.
async fn ask_agents(client: &Client, nodes: &[Node], timeout: Duration) -> Vec<AgentAnswer> {
    let places = Arc::new(Semaphore::new(AT_ONCE));
    let mut asking = JoinSet::new();
    for (index, node) in nodes.iter().enumerate() {
        let (client, host, places) = (client.clone(), node.host.clone(), places.clone());
        asking.spawn(async move {
            let _place = places.acquire().await;
            (index, ask_agent(&client, &host, timeout).await)
        });
    }
    let mut answers = asking.join_all().await;
    answers.sort_by_key(|(index, _)| *index);
    answers.into_iter().map(|(_, answer)| answer).collect()
}

async fn ask_agent(client: &Client, host: &HostName, timeout: Duration) -> AgentAnswer {
    timed(client.agent_status(host, timeout), |status| status.clock_ms).await
}

/// One line a check, what to do under each fault, and the sum of it.
fn text(diagnosis: &Diagnosis) -> String {
    let findings = &diagnosis.findings;
    let width = |of: fn(&Finding) -> &str| findings.iter().map(|f| of(f).len()).max().unwrap_or(0);
    let (subjects, checks) = (width(|f| &f.subject), width(|f| f.check));
    let mut text = String::new();
    for f in findings {
        let (subject, message) = (clean(&f.subject), clean(&f.message));
        let (level, check) = (word(f.level), f.check);
        text.push_str(&format!(
            "{level:<4}  {subject:<subjects$}  {check:<checks$}  {message}\n"
        ));
        if let Some(remedy) = &f.remedy {
            text.push_str(&format!("      what to do: {}\n", clean(remedy)));
        }
    }
    text + &sum(findings)
}

fn word(level: Level) -> &'static str {
    match level {
        Level::Ok => "ok",
        Level::Warn => "warn",
        Level::Fail => "FAIL",
    }
}

fn sum(findings: &[Finding]) -> String {
    let count = |level| findings.iter().filter(|f| f.level == level).count();
    match (count(Level::Fail), count(Level::Warn)) {
        (0, 0) => "all is well".to_owned(),
        (0, warnings) => format!("nothing failed, {warnings} to look at"),
        (failures, warnings) => format!("{failures} failed, {warnings} to look at"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_diagnosis_looks_so() {
        let bad = Trouble::new(Exit::Failed, "nobody\x1b[2J listens").remedy("start it");
        let findings = vec![
            Finding::ok("config", "readable", "/etc/drover/drover.toml"),
            Finding::trouble("conductor", "answers", &bad),
        ];
        let expected = "\
ok    config     readable  /etc/drover/drover.toml
FAIL  conductor  answers   nobody[2J listens
      what to do: start it
1 failed, 0 to look at";
        assert_eq!(text(&Diagnosis::from(findings)), expected);
    }
}
