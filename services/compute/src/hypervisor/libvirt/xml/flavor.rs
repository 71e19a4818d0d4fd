//! A definition of another size: Nova's *resize*.

use drover_model::migration::Flavor;
use xmltree::{Element, XMLNode};

use super::{Result, XmlError, descend, element_text, parse};

/// The definition with that many vCPUs and that much memory.
pub(in super::super) fn apply(xml: &str, flavor: Flavor) -> Result<String> {
    let mut domain = parse(xml, "domain")?;
    for name in ["memory", "currentMemory"] {
        set(&mut domain, name, flavor.memory_mb.to_string(), Some("MiB"));
    }
    set(&mut domain, "vcpu", flavor.vcpus.to_string(), None);
    if let Some(vcpu) = domain.get_mut_child("vcpu") {
        vcpu.attributes.swap_remove("current");
    }
    if descend(&domain, &["cpu", "numa"]).is_some() {
        return Err(XmlError::Malformed(
            "the guest has NUMA cells, which tell a size of their own".to_owned(),
        ));
    }
    for (parent, child) in [
        ("cpu", "topology"),
        ("domain", "vcpus"),
        ("domain", "maxMemory"),
    ] {
        let place = match parent {
            "domain" => Some(&mut domain),
            name => domain.get_mut_child(name),
        };
        if let Some(place) = place {
            drop(place.take_child(child));
        }
    }
    element_text(&domain)
}

fn set(domain: &mut Element, name: &str, value: String, unit: Option<&str>) {
    if domain.get_child(name).is_none() {
        domain.children.push(XMLNode::Element(Element::new(name)));
    }
    let Some(element) = domain.get_mut_child(name) else {
        return;
    };
    element.children = vec![XMLNode::Text(value)];
    if let Some(unit) = unit {
        element
            .attributes
            .insert("unit".to_owned(), unit.to_owned());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn size_changes_and_nothing_else() {
        let before = "<domain type='kvm'><name>a &amp; b</name><memory unit='KiB'>1</memory>\
            <currentMemory unit='KiB'>1</currentMemory><vcpu placement='static' current='1'>2</vcpu>\
            <cpu mode='host-model'><topology sockets='2' cores='1' threads='1'/></cpu></domain>";
        let size = Flavor {
            vcpus: 3,
            memory_mb: 256,
        };
        let after = apply(before, size).unwrap();
        for part in [
            "<name>a &amp; b</name>",
            "<memory unit=\"MiB\">256</memory>",
            "<currentMemory unit=\"MiB\">256</currentMemory>",
            "<vcpu placement=\"static\">3</vcpu>",
        ] {
            assert!(after.contains(part), "{part} in {after}");
        }
        assert!(!after.contains("topology"), "{after}");
        let numa = before.replace("<topology", "<numa/><topology");
        assert!(apply(&numa, size).is_err());
    }
}
