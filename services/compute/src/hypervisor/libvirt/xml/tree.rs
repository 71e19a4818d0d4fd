//! Text into a tree of elements. Not by `xmltree` itself, which drops the prefixes
//! of attributes, so that two become one, and calls itself for each element within
//! another, for which a stack may be too small.

use ::xml::{
    attribute::OwnedAttribute,
    name::OwnedName,
    reader::{EventReader, ParserConfig, XmlEvent},
};
use xmltree::{Element, Namespace, XMLNode};

use super::{Result, XmlError};

/// Elements within elements; libvirt's own have about ten.
pub(super) const DEEPEST: usize = 64;

/// The root element. Attributes are named as they are written, prefixes and all.
pub(super) fn read(xml: &str) -> Result<Element> {
    let malformed = |words: String| XmlError::Malformed(words);
    let config = ParserConfig::new().ignore_comments(false);
    let (mut open, mut root) = (Vec::<Element>::new(), None);
    for event in EventReader::new_with_config(xml.as_bytes(), config) {
        let node = match event.map_err(|e| malformed(e.to_string()))? {
            XmlEvent::StartElement {
                name,
                attributes,
                namespace,
            } => {
                if open.len() >= DEEPEST {
                    let words = format!("elements are nested deeper than {DEEPEST}");
                    return Err(malformed(words));
                }
                open.push(element(name, attributes, namespace));
                continue;
            }
            XmlEvent::EndElement { .. } => match open.pop() {
                Some(ended) => XMLNode::Element(ended),
                None => continue,
            },
            XmlEvent::Characters(text) => XMLNode::Text(text),
            XmlEvent::Comment(text) => XMLNode::Comment(text),
            XmlEvent::CData(text) => XMLNode::CData(text),
            XmlEvent::ProcessingInstruction { name, data } => {
                XMLNode::ProcessingInstruction(name, data)
            }
            XmlEvent::StartDocument { .. }
            | XmlEvent::EndDocument
            | XmlEvent::Doctype { .. }
            | XmlEvent::Whitespace(_) => continue,
        };
        match (open.last_mut(), node) {
            (Some(parent), node) => parent.children.push(node),
            (None, XMLNode::Element(element)) => root = root.or(Some(element)),
            // Beside the root.
            (None, _) => {}
        }
    }
    root.ok_or_else(|| malformed("it has no element".to_owned()))
}

/// A text without the references that stand for single characters; one that is not
/// known stays as it is.
pub(super) fn unescaped(text: &str) -> String {
    let mut plain = String::new();
    let mut rest = text;
    while let Some((before, after)) = rest.split_once('&') {
        plain.push_str(before);
        let reference = after.split_once(';');
        let known = reference.and_then(|(name, after)| Some((referred(name)?, after)));
        match known {
            Some((character, after)) => {
                plain.push(character);
                rest = after;
            }
            None => {
                plain.push('&');
                rest = after;
            }
        }
    }
    plain + rest
}

fn referred(name: &str) -> Option<char> {
    let code = match name {
        "amp" => return Some('&'),
        "lt" => return Some('<'),
        "gt" => return Some('>'),
        "quot" => return Some('"'),
        "apos" => return Some('\''),
        _ => name.strip_prefix('#')?,
    };
    let code = match code.strip_prefix('x') {
        Some(digits) => u32::from_str_radix(digits, 16),
        None => code.parse(),
    };
    char::from_u32(code.ok()?)
}

fn element(name: OwnedName, attributes: Vec<OwnedAttribute>, within: Namespace) -> Element {
    let named = |attribute: OwnedAttribute| {
        let OwnedName {
            prefix, local_name, ..
        } = attribute.name;
        let name = match prefix {
            Some(prefix) => format!("{prefix}:{local_name}"),
            None => local_name,
        };
        (name, attribute.value)
    };
    Element {
        prefix: name.prefix,
        namespace: name.namespace,
        namespaces: (!within.is_essentially_empty()).then_some(within),
        name: name.local_name,
        attributes: attributes.into_iter().map(named).collect(),
        children: Vec::new(),
    }
}
