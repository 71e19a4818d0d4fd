//! What holds of definitions: each reader tells the same of them, and those written
//! anew keep all that is not meant to change. The body of a fuzz target.

use drover_model::{
    api::compute::{DiskMove, NicMove, TransferPlan},
    guest::{DiskSource, Guest, NicAttachment, PowerState},
    ids::ProjectId,
    migration::{Flavor, TransferMode},
};
use xmltree::{Element, XMLNode};

use super::{
    super::xml,
    Outside, flavor, handover, notes,
    owner::{self, Owner},
    rewire,
};

const OUTSIDE: Outside = Outside {
    power_state: PowerState::Running,
    persistent: true,
};
/// A project that no definition of the corpus names.
const RECEIVER: Owner<'static> = Owner {
    id: "receiver-of-the-fuzz",
    name: "R & <D>",
};

/// A domain's XML.
pub fn domain(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else {
        return;
    };
    let Ok(tree) = xml::parse(text, "domain") else {
        assert!(xml::guest(text, OUTSIDE).is_err());
        assert!(xml::storage(text).is_err() && notes::read(text).is_err());
        return;
    };
    written_again(&tree);
    of_generation(text, &tree);
    autostart(text, &tree);
    owners(&tree);
    let Ok(guest) = xml::guest(text, OUTSIDE) else {
        return;
    };
    agrees(text, &guest);
    resized(text, &guest, &tree);
    transferred(text, &guest, &tree);
}

fn parse(text: &str) -> Element {
    xml::parse(text, "domain").expect("what was written is read")
}

fn written_again(tree: &Element) {
    let Ok(text) = xml::element_text(tree) else {
        panic!("what was read can be written");
    };
    assert_same(&parse(&text), tree);
}

/// Each reader tells the same of the same thing.
fn agrees(text: &str, guest: &Guest) {
    assert_eq!(xml::domain_id(text), Ok(guest.id));
    assert_eq!(xml::domain_name(text).as_ref(), Ok(&guest.name));
    let storage = xml::storage(text).expect("it is read");
    for disk in &guest.disks {
        if let Some(path) = disk.local_path() {
            assert!(path.starts_with('/') && storage.paths.iter().any(|p| p == path));
        }
        let mut below = disk.backing.iter();
        assert!(below.all(|image| storage.paths.contains(&image.path)));
    }
    assert!(guest.reads.iter().all(|file| file.path.starts_with('/')));
    assert!(guest.vcpus.checked_mul(1).is_some() && !guest.project.is_empty());
    let written = xml::element_text(&parse(text)).expect("it is written");
    assert_eq!(xml::guest(&written, OUTSIDE).as_ref(), Ok(guest));
}

fn of_generation(text: &str, tree: &Element) {
    let before = notes::read(text).expect("it is read");
    let written = notes::of_generation(text, 77).expect("it is written");
    let after = notes::read(&written).expect("what was written is read");
    assert_eq!(after.generation, 77);
    assert_eq!(
        (after.wishes, after.autostart),
        (before.wishes, before.autostart)
    );
    let [now, was] = [parse(&written), tree.clone()].map(|mut tree| {
        for element in owner::elements(&mut tree).filter(|e| owner::is_drovers(e)) {
            owner::child(element, "generation").children.clear();
        }
        tree
    });
    assert_same(&now, &was);
}

fn autostart(text: &str, tree: &Element) {
    let changes = notes::with_autostart(text).expect("it is read");
    let says_so = notes::read(text).expect("it is read").autostart;
    // An element that says so already has nothing to change.
    if changes.is_empty() {
        assert!(says_so);
    }
    assert!(
        owner::differences(tree, tree)
            .expect("it is written")
            .is_empty()
    );
}

fn owners(tree: &Element) {
    let mut given = tree.clone();
    owner::give(&mut given, RECEIVER);
    let mut twice = given.clone();
    owner::give(&mut twice, RECEIVER);
    assert_same(&twice, &given);
    let changes = owner::changes(tree, RECEIVER).expect("it is written");
    assert!(
        owner::changes(&given, RECEIVER)
            .expect("it is written")
            .is_empty()
    );
    assert!(changes.iter().all(|change| !change.namespace.is_empty()));
}

fn resized(text: &str, guest: &Guest, tree: &Element) {
    let size = Flavor {
        vcpus: 3,
        memory_mb: 320,
    };
    let Ok(written) = flavor::apply(text, size) else {
        return;
    };
    let after = xml::guest(&written, OUTSIDE).expect("what was written is read");
    assert_eq!((after.vcpus, after.memory_mib), (3, 320));
    let kept = |guest: &Guest| Guest {
        vcpus: 0,
        memory_mib: 0,
        cpu_xml: None,
        ..guest.clone()
    };
    assert_eq!(kept(&after), kept(guest));
    let [now, was] = [parse(&written), tree.clone()].map(|mut tree| {
        for name in ["memory", "currentMemory", "vcpu", "vcpus", "maxMemory"] {
            without_first(&mut tree, name);
        }
        if let Some(cpu) = tree.get_mut_child("cpu") {
            without_first(cpu, "topology");
        }
        tree
    });
    assert_same(&now, &was);
}

fn without_first(parent: &mut Element, name: &str) {
    drop(parent.take_child(name));
}

/// In other hands: with another owner, plugged in elsewhere, its first disk at
/// another place, and otherwise the same.
fn transferred(text: &str, guest: &Guest, tree: &Element) {
    let to = NicAttachment::Bridge {
        bridge: "br-fuzz".to_owned(),
    };
    // Of two with one name the first is meant, in either reading.
    let nic = guest.nics.iter().find(|nic| !nic.mac.is_empty());
    let disk = guest.disks.iter().find(|disk| {
        let same = |other: &&drover_model::guest::Disk| other.target == disk.target;
        let alone = guest.disks.iter().filter(same).count() == 1;
        matches!(disk.source, DiskSource::File { .. }) && !disk.target.is_empty() && alone
    });
    let plan = TransferPlan {
        mode: TransferMode::Cold,
        project: RECEIVER.id.parse::<ProjectId>().expect("a project"),
        project_name: RECEIVER.name.to_owned(),
        nics: nic
            .map(|nic| NicMove {
                mac: nic.mac.clone(),
                from: nic.attachment.clone(),
                to: to.clone(),
                new_mac: None,
            })
            .into_iter()
            .collect(),
        disks: disk
            .map(|disk| DiskMove {
                target: disk.target.clone(),
                from: disk.local_path().unwrap_or_default().to_owned(),
                to: "/other/place".to_owned(),
                format: disk.format.clone(),
                backing: disk.backing.clone(),
                flatten: false,
                data_bytes: 0,
            })
            .into_iter()
            .collect(),
        name: None,
        title: None,
    };
    let written = match handover::transferred(text, &plan) {
        Ok(written) => written,
        // Without devices there is nothing to hand over.
        Err(error) => {
            assert!(tree.get_child("devices").is_none(), "{error}");
            return;
        }
    };
    let after = xml::guest(&written, OUTSIDE).expect("what was written is read");
    assert_eq!(after.project, RECEIVER.id);
    let mut expected = guest.clone();
    expected.project.clone_from(&after.project);
    if let Some(nic) = nic {
        let at = |nics: &[drover_model::guest::Nic]| nics.iter().position(|n| n.mac == nic.mac);
        let at = at(&guest.nics).expect("it is there");
        assert_eq!(
            (&after.nics[at].mac, &after.nics[at].attachment),
            (&nic.mac, &to)
        );
        expected.nics[at] = after.nics[at].clone();
        // What tied it to its node may go with its place, what binds to addresses too.
        assert!(
            after
                .immovable
                .iter()
                .all(|what| expected.immovable.contains(what))
        );
        expected.immovable.clone_from(&after.immovable);
        assert!(after.bound.iter().all(|what| expected.bound.contains(what)));
        expected.bound.clone_from(&after.bound);
    }
    if let Some(disk) = disk {
        let moved = expected.disks.iter_mut().find(|d| d.target == disk.target);
        let source = DiskSource::File {
            path: "/other/place".to_owned(),
        };
        moved.expect("it is there").source = source;
    }
    assert_eq!(after, expected);
    let [now, was] = [parse(&written), tree.clone()].map(|mut tree| {
        owner::give(&mut tree, RECEIVER);
        let devices = tree.get_mut_child("devices").expect("they are there");
        let elements = devices
            .children
            .iter_mut()
            .filter_map(XMLNode::as_mut_element);
        for element in elements {
            let mac = rewire::mac(element).map(str::to_ascii_lowercase);
            if element.name == "interface" && mac.is_some() && mac == nic.map(|n| n.mac.clone()) {
                *element = rewire::plugged(element, &to).expect("a bridge");
            }
            let file = handover::file(element).map(str::to_owned);
            let is_it = |disk: &drover_model::guest::Disk| {
                let target = element.get_child("target");
                let target = target.and_then(|t| t.attributes.get("dev"));
                target == Some(&disk.target) && file.as_deref() == disk.local_path()
            };
            if element.name == "disk"
                && disk.is_some_and(is_it)
                && let Some(source) = element.get_mut_child("source")
            {
                rewire::set(source, "file", "/other/place");
            }
        }
        tree
    });
    assert_same(&now, &was);
}

/// Whether two trees say the same. Text may have been broken up otherwise: what is
/// next to each other is one.
fn assert_same(one: &Element, other: &Element) {
    let (one, other) = (plain(one), plain(other));
    assert_eq!(one, other);
}

/// Everything an element says, in one form.
#[derive(Debug, PartialEq, Eq)]
enum Said {
    Element {
        name: (Option<String>, String),
        attributes: Vec<(String, String)>,
        children: Vec<Said>,
    },
    Text(String),
    Comment(String),
    Instruction(String, Option<String>),
}

fn plain(element: &Element) -> Said {
    let mut children = Vec::new();
    for child in &element.children {
        match child {
            XMLNode::Element(child) => children.push(plain(child)),
            XMLNode::Text(text) | XMLNode::CData(text) => {
                if let Some(Said::Text(before)) = children.last_mut() {
                    before.push_str(text);
                } else {
                    children.push(Said::Text(text.clone()));
                }
            }
            XMLNode::Comment(text) => children.push(Said::Comment(text.clone())),
            XMLNode::ProcessingInstruction(name, data) => {
                children.push(Said::Instruction(name.clone(), data.clone()));
            }
        }
    }
    // Blanks between elements say nothing; within text they do.
    children.retain(|child| !matches!(child, Said::Text(text) if text.trim().is_empty()));
    let mut attributes: Vec<_> = element.attributes.clone().into_iter().collect();
    attributes.sort();
    Said::Element {
        name: (element.namespace.clone(), element.name.clone()),
        attributes,
        children,
    }
}
