//! Copies that libvirt has lost track of. A libvirtd that dies just after it has
//! told QEMU to begin one knows nothing of it afterwards (seen on libvirt 9.0),
//! while QEMU copies on and holds the file. QEMU itself is asked then, and told
//! to stop. Everything here blocks.

use std::{thread::sleep, time::Duration};

use serde_json::{Value, json};
use virt::domain::Domain;

use crate::hypervisor::{HypervisorError, libvirt::errors::CallResult};

/// Time between two looks at a job that is to end.
const LOOK: Duration = Duration::from_millis(50);
/// Looks until it is given up.
const LOOKS: u32 = 100;

/// Ends every job of QEMU's that copies a disk to that file, and has QEMU close
/// the file. Only for a disk on which libvirt has no job.
pub(super) fn end(domain: &Domain, target: &str, file: &str) -> CallResult<()> {
    let prefix = format!("copy-{target}-");
    for _ in 0..LOOKS {
        let jobs = ask(domain, "query-block-jobs", &json!({}))?;
        let mine: Vec<&str> = names(&jobs, "device")
            .filter(|name| name.starts_with(&prefix))
            .collect();
        if mine.is_empty() {
            return close(domain, file);
        }
        for job in mine {
            // One that is ending already says no.
            let _ = ask(
                domain,
                "block-job-cancel",
                &json!({"device": job, "force": true}),
            );
        }
        sleep(LOOK);
    }
    Err(HypervisorError::WrongState(format!("QEMU does not stop copying to {file}")).into())
}

/// Nodes go from the top: one that another stands on cannot go before it.
fn close(domain: &Domain, file: &str) -> CallResult<()> {
    /// Format, storage, and throttling between them.
    const DEEPEST: usize = 4;
    for _ in 0..DEEPEST {
        let nodes = ask(domain, "query-named-block-nodes", &json!({"flat": true}))?;
        let all = nodes.as_array().into_iter().flatten();
        let mine: Vec<&str> = all
            .filter(|node| node["file"] == file)
            .filter_map(|node| node["node-name"].as_str())
            .collect();
        for node in &mine {
            let _ = ask(domain, "blockdev-del", &json!({"node-name": node}));
        }
        if mine.is_empty() {
            break;
        }
    }
    Ok(())
}

fn names<'a>(list: &'a Value, key: &'a str) -> impl Iterator<Item = &'a str> {
    let all = list.as_array().into_iter().flatten();
    all.filter_map(move |item| item[key].as_str())
}

/// Asks QEMU's monitor.
fn ask(domain: &Domain, command: &str, arguments: &Value) -> CallResult<Value> {
    let text = json!({"execute": command, "arguments": arguments}).to_string();
    let answer = domain.qemu_monitor_command(&text, 0)?;
    let unread = |e: serde_json::Error| HypervisorError::Failed(format!("QEMU's {command}: {e}"));
    let answer: Value = serde_json::from_str(&answer).map_err(unread)?;
    match answer.get("return") {
        Some(value) => Ok(value.clone()),
        None => {
            Err(HypervisorError::Failed(format!("QEMU's {command}: {}", answer["error"])).into())
        }
    }
}
