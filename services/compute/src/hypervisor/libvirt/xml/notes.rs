//! What Drover's element of `<metadata>` says beside whose a guest is, read and
//! written:
//!
//! ```xml
//! <drover:instance xmlns:drover="https://drover.dev/xmlns/instance/1">
//!   <drover:priority>10</drover:priority>
//!   <drover:anti_affinity>web</drover:anti_affinity>   <!-- as often as there are groups -->
//!   <drover:generation>1</drover:generation>
//!   <drover:autostart/>
//! </drover:instance>
//! ```

use drover_model::node::Wishes;
use xmltree::{Element, XMLNode};

use super::{
    Result, children, element_text,
    owner::{self, Change},
    parse, text,
};

/// Longest name of a group, characters.
const LONGEST_GROUP: usize = 255;
/// Groups of one guest; the rest is not read.
const MOST_GROUPS: usize = 32;

/// What is said.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(in super::super) struct Notes {
    /// Its place among others.
    pub(in super::super) wishes: Wishes,
    /// It is to be started at boot, once somebody has asked whether it may.
    pub(in super::super) autostart: bool,
    /// How often it was rebuilt elsewhere.
    pub(in super::super) generation: u64,
}

/// Reads it. What makes no sense is not said.
pub(in super::super) fn read(xml: &str) -> Result<Notes> {
    let domain = parse(xml, "domain")?;
    let metadata = domain.get_child("metadata");
    let instances = metadata
        .into_iter()
        .flat_map(|m| children(m, "instance"))
        .filter(|e| owner::is_drovers(e));
    let Some(element) = instances.last() else {
        return Ok(Notes::default());
    };
    let number = |name| text(element, name);
    Ok(Notes {
        wishes: Wishes {
            priority: number("priority").and_then(|t| t.parse().ok()).unwrap_or(0),
            anti_affinity: groups(element),
        },
        autostart: element.get_child("autostart").is_some(),
        generation: number("generation")
            .and_then(|t| t.parse().ok())
            .unwrap_or(0),
    })
}

fn groups(element: &Element) -> Vec<String> {
    let named = children(element, "anti_affinity").filter_map(Element::get_text);
    let names = named.map(|text| text.trim().to_owned());
    let sound = names.filter(|name| {
        !name.is_empty()
            && name.chars().count() <= LONGEST_GROUP
            && !name.chars().any(char::is_control)
    });
    let mut groups: Vec<String> = sound.take(MOST_GROUPS).collect();
    groups.sort_unstable();
    groups.dedup();
    groups
}

/// A definition that is of that generation, and otherwise as it was.
pub(in super::super) fn of_generation(xml: &str, generation: u64) -> Result<String> {
    let mut domain = parse(xml, "domain")?;
    for element in owner::elements(&mut domain).filter(|e| owner::is_drovers(e)) {
        let child = owner::child(element, "generation");
        child.children = vec![XMLNode::Text(generation.to_string())];
    }
    element_text(&domain)
}

/// What has to change in a definition for it to wish to be started at boot.
pub(in super::super) fn with_autostart(xml: &str) -> Result<Vec<Change>> {
    let domain = parse(xml, "domain")?;
    let mut wanted = domain.clone();
    for element in owner::elements(&mut wanted).filter(|e| owner::is_drovers(e)) {
        owner::child(element, "autostart");
    }
    owner::differences(&domain, &wanted)
}

/// All that a definition says but the wish to be started at boot, whatever its spelling.
pub(in super::super) fn without_autostart(xml: &str) -> Result<String> {
    let mut domain = parse(xml, "domain")?;
    if let Some(metadata) = domain.get_mut_child("metadata") {
        let elements = metadata.children.iter_mut();
        let elements = elements.filter_map(XMLNode::as_mut_element);
        for element in elements.filter(|e| owner::is_drovers(e)) {
            drop(element.take_child("autostart"));
        }
        // Made for that wish.
        metadata.children.retain(|node| {
            let element = node.as_element();
            !element.is_some_and(|e| owner::is_drovers(e) && is_bare(e))
        });
        if is_bare(metadata) {
            drop(domain.take_child("metadata"));
        }
    }
    let mut said = String::new();
    say(&domain, &mut said);
    Ok(said)
}

fn is_bare(element: &Element) -> bool {
    !element
        .children
        .iter()
        .any(|node| node.as_element().is_some())
}

/// Without prefixes, which libvirt may write in other ways, and without indentation.
fn say(element: &Element, said: &mut String) {
    said.push_str(&format!("<{}", element.name));
    for (name, value) in &element.attributes {
        said.push_str(&format!(" {name}={value:?}"));
    }
    let words = element.get_text().unwrap_or_default();
    said.push_str(&format!(">{:?}", words.trim()));
    for child in element.children.iter().filter_map(XMLNode::as_element) {
        say(child, said);
    }
    said.push_str("</>");
}

#[cfg(test)]
mod tests {
    use super::*;

    const SAID: &str = "<domain type='kvm'><name>a</name><metadata>\
        <drover:instance xmlns:drover='https://drover.dev/xmlns/instance/1'>\
        <drover:project>p</drover:project><drover:priority>-3</drover:priority>\
        <drover:anti_affinity>web</drover:anti_affinity>\
        <drover:anti_affinity> db </drover:anti_affinity>\
        <drover:anti_affinity></drover:anti_affinity></drover:instance>\
        <other:instance xmlns:other='urn:x'><other:priority>9</other:priority></other:instance>\
        </metadata></domain>";

    #[test]
    fn wishes_are_read() {
        let notes = read(SAID).unwrap();
        assert_eq!(notes.wishes.priority, -3);
        assert_eq!(notes.wishes.anti_affinity, ["db", "web"]);
        assert!(!notes.autostart);
        assert_eq!(read("<domain/>").unwrap(), Notes::default());
        let nonsense = SAID.replace("-3", "high");
        assert_eq!(read(&nonsense).unwrap().wishes.priority, 0);
    }

    #[test]
    fn a_generation_is_written_and_nothing_else_changes() {
        let before = read(SAID).unwrap();
        let text = of_generation(SAID, 1).unwrap();
        let once = read(&text).unwrap();
        assert_eq!((once.generation, &once.wishes), (1, &before.wishes));
        assert!(
            text.contains("<drover:project>p</drover:project>"),
            "{text}"
        );
        let again = read(&of_generation(&text, 7).unwrap()).unwrap();
        assert_eq!(again.generation, 7);
        let bare = of_generation("<domain><name>a</name></domain>", 2).unwrap();
        assert_eq!(read(&bare).unwrap().generation, 2);
    }

    #[test]
    fn a_wish_to_be_started_is_one_change_and_no_second() {
        let changes = with_autostart(SAID).unwrap();
        let [change] = &changes[..] else {
            panic!("{changes:?}");
        };
        let content = change.content.as_deref().unwrap();
        assert!(
            content.contains("autostart") && content.contains("web"),
            "{content}"
        );
        let said = SAID.replace("<drover:project>", "<drover:autostart/><drover:project>");
        assert!(read(&said).unwrap().autostart);
        assert_eq!(with_autostart(&said).unwrap(), []);
    }

    #[test]
    fn but_for_the_wish_to_be_started_every_change_is_seen() {
        let said = |xml: &str| without_autostart(xml).unwrap();
        let wishes = SAID.replace("<drover:project>", "<drover:autostart/>\n <drover:project>");
        assert_eq!(said(&wishes), said(SAID));
        let bare = "<domain type='kvm'><name>a</name></domain>";
        let made = format!(
            "<domain type='kvm'>\n <name>a</name><metadata><drover:instance \
             xmlns:drover='{}'><drover:autostart/></drover:instance></metadata></domain>",
            drover_model::METADATA_NAMESPACE
        );
        assert_eq!(said(&made), said(bare));
        for (old, new) in [
            (">a<", ">b<"),
            ("'kvm'", "'qemu'"),
            ("-3", "-4"),
            ("<name>a</name>", ""),
        ] {
            assert_ne!(said(&SAID.replacen(old, new, 1)), said(SAID), "{old}");
        }
    }
}
