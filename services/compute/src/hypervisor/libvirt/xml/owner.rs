//! Whose a guest is, written into its definition: Drover's element of
//! `<metadata>`, Nova's if there is one, and `<title>`.

use drover_model::METADATA_NAMESPACE;
use xmltree::{Element, Namespace, XMLNode};

use super::{NOVA_NAMESPACE, Result, element_text, rewire::set, text};

/// Prefix of Drover's namespace where Drover writes it.
const PREFIX: &str = "drover";

/// A project as definitions name it.
#[derive(Debug, Clone, Copy)]
pub(in super::super) struct Owner<'a> {
    /// Its id.
    pub(in super::super) id: &'a str,
    /// What people call it.
    pub(in super::super) name: &'a str,
}

/// An element of `<metadata>` to write, in the form libvirt's call wants.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in super::super) struct Change {
    /// Its namespace.
    pub(in super::super) namespace: String,
    /// Prefix for that.
    pub(in super::super) prefix: String,
    /// The element without the namespace; none takes it away.
    pub(in super::super) content: Option<String>,
}

/// What has to change for the guest to be `owner`'s.
pub(in super::super) fn changes(domain: &Element, owner: Owner<'_>) -> Result<Vec<Change>> {
    let mut wanted = domain.clone();
    give(&mut wanted, owner);
    differences(domain, &wanted)
}

/// What has to change in `now` for it to say what `wanted` says.
pub(in super::super) fn differences(now: &Element, wanted: &Element) -> Result<Vec<Change>> {
    let of = |domain| owners(domain).map(|e| (e.namespace.as_deref().unwrap_or_default(), e));
    let (now, wanted): (Vec<_>, Vec<_>) = (of(now).collect(), of(wanted).collect());
    let mut changes = Vec::new();
    for (namespace, element) in &wanted {
        let same = |(n, e): &(&str, &Element)| n == namespace && is_same(e, element);
        if !now.iter().any(same) {
            changes.push(Change {
                namespace: (*namespace).to_owned(),
                prefix: prefix(element),
                content: Some(element_text(&bare(element, namespace))?),
            });
        }
    }
    let gone = now
        .iter()
        .filter(|(n, _)| !wanted.iter().any(|(w, _)| w == n));
    changes.extend(gone.map(|(namespace, element)| Change {
        namespace: (*namespace).to_owned(),
        prefix: prefix(element),
        content: None,
    }));
    Ok(changes)
}

fn prefix(element: &Element) -> String {
    let prefix = element.prefix.clone().filter(|p| !p.is_empty());
    prefix.unwrap_or_else(|| PREFIX.to_owned())
}

/// Elements of `<metadata>` that say whose the guest is.
fn owners(domain: &Element) -> impl Iterator<Item = &Element> {
    let metadata = domain.get_child("metadata").into_iter();
    let elements = metadata.flat_map(|m| m.children.iter().filter_map(XMLNode::as_element));
    elements.filter(|e| is_drovers(e) || is_novas(e))
}

pub(super) fn is_drovers(element: &Element) -> bool {
    element.name == "instance" && element.namespace.as_deref() == Some(METADATA_NAMESPACE)
}

fn is_novas(element: &Element) -> bool {
    let namespace = element.namespace.as_deref();
    element.name == "instance" && namespace.is_some_and(|n| n.starts_with(NOVA_NAMESPACE))
}

/// The elements of `<metadata>`, Drover's among them: made if it is not there.
pub(super) fn elements(domain: &mut Element) -> impl Iterator<Item = &mut Element> {
    if domain.get_child("metadata").is_none() {
        domain
            .children
            .push(XMLNode::Element(Element::new("metadata")));
    }
    let metadata = domain.get_mut_child("metadata");
    let metadata = metadata.expect("it is there or was made");
    let found = || metadata.children.iter().filter_map(XMLNode::as_element);
    if !found().any(is_drovers) {
        metadata.children.push(XMLNode::Element(new_element()));
    }
    let children = metadata.children.iter_mut();
    children.filter_map(XMLNode::as_mut_element)
}

/// Makes a definition `owner`'s. What else these elements say stays.
pub(super) fn give(domain: &mut Element, owner: Owner<'_>) {
    for element in elements(domain) {
        if is_drovers(element) {
            let project = child(element, "project");
            project.children = vec![XMLNode::Text(owner.id.to_owned())];
        } else if is_novas(element) {
            give_novas(element, owner);
        }
    }
}

/// Nova's element names a user and ports of the project, too: of the new one
/// there are none.
fn give_novas(instance: &mut Element, owner: Owner<'_>) {
    drop(instance.take_child("ports"));
    let Some(place) = instance.get_mut_child("owner") else {
        return;
    };
    drop(place.take_child("user"));
    let project = child(place, "project");
    set(project, "uuid", owner.id);
    project.children = vec![XMLNode::Text(owner.name.to_owned())];
}

fn new_element() -> Element {
    let mut namespaces = Namespace::empty();
    namespaces.put(PREFIX, METADATA_NAMESPACE);
    let mut element = Element::new("instance");
    element.prefix = Some(PREFIX.to_owned());
    element.namespace = Some(METADATA_NAMESPACE.to_owned());
    element.namespaces = Some(namespaces);
    element
}

/// The child of that name, made in its parent's namespace if it is not there.
pub(super) fn child<'a>(parent: &'a mut Element, name: &str) -> &'a mut Element {
    if parent.get_child(name).is_none() {
        let mut made = Element::new(name);
        made.prefix.clone_from(&parent.prefix);
        made.namespace.clone_from(&parent.namespace);
        parent.children.push(XMLNode::Element(made));
    }
    parent.get_mut_child(name).expect("it is there or was made")
}

/// The element without its namespace, which libvirt puts there again.
fn bare(element: &Element, namespace: &str) -> Element {
    let mut bare = element.clone();
    if bare.namespace.as_deref() == Some(namespace) {
        (bare.prefix, bare.namespace, bare.namespaces) = (None, None, None);
    }
    for child in bare.children.iter_mut().filter_map(XMLNode::as_mut_element) {
        *child = self::bare(child, namespace);
    }
    bare
}

/// Whether two elements say the same, whitespace and prefixes apart.
pub(in super::super) fn is_same(one: &Element, other: &Element) -> bool {
    let elements = |e: &Element| -> Vec<Element> {
        let children = e.children.iter().filter_map(XMLNode::as_element);
        children.cloned().collect()
    };
    let words = |e: &Element| e.get_text().unwrap_or_default().trim().to_owned();
    let (a, b) = (elements(one), elements(other));
    one.name == other.name
        && one.namespace == other.namespace
        && one.attributes == other.attributes
        && words(one) == words(other)
        && a.len() == b.len()
        && a.iter().zip(&b).all(|(a, b)| is_same(a, b))
}

/// The guest's title, if it has one.
pub(in super::super) fn title(domain: &Element) -> Option<String> {
    text(domain, "title")
}
