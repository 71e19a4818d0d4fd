//! The command line of projects: what there is of them, and what is set.

use clap::{Args, Subcommand};
use drover_model::{
    api::conductor::ProjectChange,
    guest::NicAttachment,
    ids::{BadHostName, HostName, ProjectId},
    project::{Limit, Location, NetworkPlace, Project, StoragePlace},
};

use super::{Change, pair, some_text};

const PLACES: &str = "\
A network or storage is said again for each group of nodes on which it is something
else; where no HOST is named it goes for all nodes that are not named elsewhere.
What is said of a network, or of storage, replaces all that was said of it before.";

/// What can be done with projects.
#[derive(Debug, Subcommand)]
pub enum ProjectVerb {
    /// All projects, with what they have of what they may have
    List,
    /// One project with its networks and storage
    Show {
        /// Id or name.
        #[arg(value_name = "P", value_parser = some_text)]
        project: String,
    },
    /// Make a project
    #[command(after_help = PLACES)]
    Create(Box<CreateProject>),
    /// Change a project; what is left out stays as it is
    #[command(after_help = PLACES)]
    Set(Box<SetProject>),
}

/// Making a project.
#[derive(Debug, Args)]
pub struct CreateProject {
    /// Id, as instances' metadata name it.
    pub id: ProjectId,
    /// It may not get instances yet
    #[arg(long)]
    pub disabled: bool,
    /// What it is like.
    #[command(flatten)]
    pub shape: Shape,
    /// How to do it.
    #[command(flatten)]
    pub change: Change,
}

impl CreateProject {
    /// The project as it is wished.
    ///
    /// # Errors
    /// It cannot be; says why.
    pub fn project(&self) -> Result<Project, String> {
        let change = ProjectChange {
            enabled: Some(!self.disabled),
            ..self.shape.change()
        };
        sound(change.applied(&Project::new(self.id.clone())))
    }
}

/// Changing a project.
#[derive(Debug, Args)]
pub struct SetProject {
    /// Id or name.
    #[arg(value_name = "P", value_parser = some_text)]
    pub project: String,
    /// It may get instances
    #[arg(long)]
    pub enable: bool,
    /// It may get no more instances; those it has stay
    #[arg(long, conflicts_with = "enable")]
    pub disable: bool,
    /// It has that network no longer
    #[arg(long, value_name = "NAME", value_parser = some_text)]
    pub remove_network: Vec<String>,
    /// Disks of guests that it gets stay wherever they are
    #[arg(long, conflicts_with = "storage")]
    pub no_storage: bool,
    /// What else changes.
    #[command(flatten)]
    pub shape: Shape,
    /// How to do it.
    #[command(flatten)]
    pub change: Change,
}

impl SetProject {
    /// What is to change.
    ///
    /// # Errors
    /// Nothing, or what cannot be; says why.
    pub fn wished(&self) -> Result<ProjectChange, String> {
        let mut change = self.shape.change();
        change.enabled = (self.enable || self.disable).then_some(self.enable);
        if self.no_storage {
            change.storage = Some(Vec::new());
        }
        for network in &self.remove_network {
            let said = change.networks.insert(network.clone(), Vec::new());
            if said.is_some_and(|places| !places.is_empty()) {
                return Err(format!("network {network} is both set and removed"));
            }
        }
        if change == ProjectChange::default() {
            return Err("nothing is to change".to_owned());
        }
        // What is wrong with the change shows on any project.
        let any = "any".parse().expect("a plain word is an id");
        sound(change.applied(&Project::new(any)))?;
        Ok(change)
    }
}

/// The project, unless something is wrong with it in itself.
///
/// # Errors
/// Everything that is.
pub fn sound(project: Project) -> Result<Project, String> {
    let problems = project.problems();
    if problems.is_empty() {
        Ok(project)
    } else {
        Err(problems.join("; "))
    }
}

/// What a project is like.
#[derive(Debug, Args)]
pub struct Shape {
    /// What people call it; a new one is called by its id
    #[arg(long)]
    pub name: Option<String>,
    /// Instances it may have: a number, or `unlimited`
    #[arg(long, value_name = "N", value_parser = limit)]
    pub instances: Option<Limit>,
    /// vCPUs of all its instances
    #[arg(long, value_name = "N", value_parser = limit)]
    pub vcpus: Option<Limit>,
    /// Memory of all its instances, MiB
    #[arg(long, value_name = "N", value_parser = limit)]
    pub memory_mib: Option<Limit>,
    /// Disks of all its instances as they see them, GiB
    #[arg(long, value_name = "N", value_parser = limit)]
    pub disk_gib: Option<Limit>,
    /// A network of its own: NAME=bridge:BRIDGE or NAME=network:LIBVIRT_NETWORK, with @HOST,HOST
    /// if only there
    #[arg(long, value_name = "NAME=WHAT", value_parser = network)]
    pub network: Vec<(String, NetworkPlace)>,
    /// Where its disks are: directory:PATH or pool:LIBVIRT_POOL, with @HOST,HOST if only there
    #[arg(long, value_name = "WHERE", value_parser = storage)]
    pub storage: Vec<StoragePlace>,
}

impl Shape {
    fn change(&self) -> ProjectChange {
        let mut change = ProjectChange {
            name: self.name.clone(),
            instances: self.instances,
            vcpus: self.vcpus,
            memory_mb: self.memory_mib,
            disk_gb: self.disk_gib,
            storage: (!self.storage.is_empty()).then(|| self.storage.clone()),
            ..ProjectChange::default()
        };
        for (name, place) in &self.network {
            let places = change.networks.entry(name.clone()).or_default();
            places.push(place.clone());
        }
        change
    }
}

/// A limit: a number, or that there is none.
fn limit(text: &str) -> Result<Limit, String> {
    if text == "unlimited" {
        return Ok(Limit::Unlimited);
    }
    let number: Option<i64> = text.parse().ok().filter(|number| *number >= 0);
    let limit = number.and_then(|number| Limit::try_from(number).ok());
    limit.ok_or_else(|| "a limit is a number, or `unlimited`".to_owned())
}

fn network(text: &str) -> Result<(String, NetworkPlace), String> {
    let shape = || "a network is such as lan=bridge:br0 or lan=network:default@kvm1,kvm2";
    let (name, place) = pair(text).ok_or_else(shape)?;
    let (what, nodes) = placed(&place)?;
    let attachment = match what.split_once(':').ok_or_else(shape)? {
        ("bridge", bridge) => NicAttachment::Bridge {
            bridge: bridge.to_owned(),
        },
        ("network", network) => NicAttachment::Network {
            network: network.to_owned(),
        },
        (kind, _) => return Err(format!("'{kind}' is neither bridge nor network")),
    };
    Ok((name, NetworkPlace::new(nodes, attachment)))
}

fn storage(text: &str) -> Result<StoragePlace, String> {
    let shape = || "storage is such as directory:/srv/guests or pool:default@kvm1,kvm2";
    let (what, nodes) = placed(text)?;
    let location = match what.split_once(':').ok_or_else(shape)? {
        ("directory", path) => Location::Directory {
            path: path.to_owned(),
        },
        ("pool", pool) => Location::Pool {
            pool: pool.to_owned(),
        },
        (kind, _) => return Err(format!("'{kind}' is neither directory nor pool")),
    };
    Ok(StoragePlace::new(nodes, location))
}

/// `WHAT@HOST,HOST`: what, and on which nodes; none named is on all.
fn placed(text: &str) -> Result<(&str, Vec<HostName>), String> {
    match text.rsplit_once('@') {
        // An `@` inside of a path.
        Some((_, rest)) if rest.contains('/') => Ok((text, Vec::new())),
        Some((what, hosts)) => {
            let hosts = hosts.split(',').map(|host| host.trim().parse());
            let hosts: Result<_, _> = hosts.collect();
            let hosts = hosts.map_err(|error: BadHostName| error.to_string())?;
            Ok((what, hosts))
        }
        None => Ok((text, Vec::new())),
    }
}
