//! `drover project`: what projects there are, making and changing them.

use drover_model::api::conductor::{ProjectView, SetProject};

use super::Session;
use crate::{
    args::project::{self as order, ProjectVerb, sound},
    exit::{Exit, Trouble},
    render::project,
};

/// Runs a verb.
pub async fn run(session: &mut Session, verb: ProjectVerb) -> Result<Exit, Trouble> {
    match verb {
        ProjectVerb::List => {
            let projects = session.client.list_projects().await?;
            session
                .screen
                .value(&projects, |projects| project::table(projects))?;
        }
        ProjectVerb::Show { project } => {
            let view = session.client.get_project(&project).await?;
            session.screen.value(&view, project::whole)?;
        }
        ProjectVerb::Create(order) => create(session, *order).await?,
        ProjectVerb::Set(order) => set(session, *order).await?,
    }
    Ok(Exit::Done)
}

/// The conductor answers when it is done: there is nothing to wait for.
async fn create(session: &mut Session, order: order::CreateProject) -> Result<(), Trouble> {
    let project = order.project().map_err(|words| usage(words, "create"))?;
    if !order.change.dry_run {
        let view = session.client.create_project(&project).await?;
        return session.screen.value(&view, project::whole);
    }
    let view = match session.client.get_project(project.id.as_str()).await {
        Ok(there) if there.project.id != project.id => None,
        Ok(there) if there.created => return Err(exists(&there)),
        // Instances name it, but nobody has made it.
        Ok(there) => Some(there),
        Err(trouble) if is_unknown(&trouble) => None,
        Err(trouble) => return Err(trouble),
    };
    let (usage, promised) = view.map_or_else(Default::default, |v| (v.usage, v.promised));
    let view = ProjectView {
        project,
        created: true,
        usage,
        promised,
    };
    session.screen.value(&view, |view| would(view, "created"))
}

async fn set(session: &mut Session, order: order::SetProject) -> Result<(), Trouble> {
    let change = order.wished().map_err(|words| usage(words, "set"))?;
    if !order.change.dry_run {
        let project = order.project;
        let request = SetProject { project, change };
        let view = session.client.set_project(&request).await?;
        return session.screen.value(&view, project::whole);
    }
    let now = session.client.get_project(&order.project).await?;
    if !now.created {
        return Err(not_made(&now));
    }
    let project = sound(change.applied(&now.project)).map_err(|words| usage(words, "set"))?;
    let done = if project == now.project {
        "left as it is"
    } else {
        "changed"
    };
    let view = ProjectView { project, ..now };
    session.screen.value(&view, |view| would(view, done))
}

fn usage(words: String, verb: &str) -> Trouble {
    Trouble::usage(words).remedy(format!("`drover project {verb} --help`"))
}

fn would(view: &ProjectView, done: &str) -> String {
    format!("it would be {done}:\n\n{}", project::whole(view))
}

fn is_unknown(trouble: &Trouble) -> bool {
    let class = trouble.class.as_deref();
    class.is_some_and(|class| class.ends_with(".ProjectNotFound"))
}

fn exists(there: &ProjectView) -> Trouble {
    let id = &there.project.id;
    Trouble::new(Exit::Failed, format!("there is a project {id} already"))
        .remedy("`drover project set` changes it")
}

fn not_made(named: &ProjectView) -> Trouble {
    let id = &named.project.id;
    let message = format!("project {id} is only named by instances; nobody has created it");
    Trouble::new(Exit::Failed, message).remedy("`drover project create` makes it")
}
