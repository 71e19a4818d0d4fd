//! Files of the node that a definition names and that are no drives: what the
//! guest is started from, and what its devices are loaded with. They are only
//! read; the guest's own (firmware variables, TPM state) are not among them.

use drover_model::content::ReadFile;
use xmltree::{Element, XMLNode};

use super::{children, descend, owned, text};

/// All of them, in the order of the definition; the same path once.
pub(super) fn read(domain: &Element, devices: &Element) -> Vec<ReadFile> {
    let mut found: Vec<ReadFile> = Vec::new();
    let mut add = |path: Option<String>, what: &str| {
        let path = path.map(|p| p.trim().to_owned());
        let Some(path) = path.filter(|p| p.starts_with('/')) else {
            return;
        };
        if !found.iter().any(|file| file.path == path) {
            let what = what.to_owned();
            found.push(ReadFile { path, what });
        }
    };
    if let Some(os) = domain.get_child("os") {
        add(text(os, "kernel"), "the kernel");
        add(text(os, "initrd"), "the initrd");
        add(text(os, "dtb"), "the device tree");
        add(text(os, "loader"), "the firmware");
        let nvram = os.get_child("nvram");
        let template = nvram.and_then(|n| owned(n, "template"));
        add(template, "the template of the firmware's variables");
        let acpi = os.get_child("acpi");
        for table in acpi.into_iter().flat_map(|a| children(a, "table")) {
            let path = table.get_text().map(|t| t.into_owned());
            add(path, "an ACPI table");
        }
    }
    for sysinfo in children(domain, "sysinfo") {
        for entry in children(sysinfo, "entry") {
            add(
                owned(entry, "file"),
                "a file of the firmware's configuration",
            );
        }
    }
    for device in devices.children.iter().filter_map(XMLNode::as_element) {
        let rom = descend(device, &["rom"]).and_then(|rom| owned(rom, "file"));
        add(rom, "an option ROM");
    }
    found
}
