//! Cuts a guest's QEMU off from the node it sends to. Everything here blocks,
//! and nothing asks libvirt.
//!
//! A node that loses its power closes no connection. A QEMU that is told to give
//! up while such a node owes it an answer about a disk waits for the answer, and
//! with it the guest and whoever asks libvirt about it, for as long as TCP is
//! patient: a quarter of an hour (seen with QEMU 7.2, a mirror over NBD). Shut,
//! the connection fails at once.

use std::{
    collections::BTreeSet,
    fs,
    net::{IpAddr, SocketAddr, ToSocketAddrs},
    ops::RangeInclusive,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
};

use drover_model::ids::InstanceId;
use rustix::{
    net::{Shutdown, getpeername, shutdown},
    process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open},
};

use crate::hypervisor::{HypervisorError, Result};

/// Shuts every TCP connection of the guest's QEMU to one of these ports of the
/// other node; says how many there were.
///
/// # Errors
/// `NoSuchGuest` if no QEMU of this node has the guest; `Failed` if the address
/// leads nowhere, or the process does not let itself be looked at.
pub(super) fn sever(id: InstanceId, address: &str, ports: &RangeInclusive<u16>) -> Result<usize> {
    let peers = resolve(address)?;
    let (pid, directory) = qemu_of(id).ok_or(HypervisorError::NoSuchGuest(id))?;
    let failed = |e: &dyn std::fmt::Display| {
        HypervisorError::Failed(format!(
            "process {} of the guest: {e}",
            pid.as_raw_nonzero()
        ))
    };
    let process = pidfd_open(pid, PidfdFlags::empty()).map_err(|e| failed(&e))?;
    // Of the process that is held now, not of a later one with its number.
    if !is_qemu_of(&directory, id) {
        return Err(HypervisorError::NoSuchGuest(id));
    }
    let mut cut = 0;
    for number in descriptors(&directory).map_err(|e| failed(&e))? {
        // One that is closed meanwhile needs no cutting.
        let Ok(held) = pidfd_getfd(&process, number, PidfdGetfdFlags::empty()) else {
            continue;
        };
        let leads_there = peer(&held).is_some_and(|to| {
            peers.contains(&to.ip().to_canonical()) && ports.contains(&to.port())
        });
        if leads_there {
            shutdown(&held, Shutdown::Both).map_err(|e| failed(&e))?;
            cut += 1;
        }
    }
    Ok(cut)
}

fn resolve(address: &str) -> Result<BTreeSet<IpAddr>> {
    let found = (address, 0).to_socket_addrs();
    let found = found.map_err(|e| HypervisorError::Failed(format!("{address:?}: {e}")))?;
    Ok(found.map(|at| at.ip().to_canonical()).collect())
}

/// The QEMU that has the guest, in this node's own network: on one machine there
/// may be others.
fn qemu_of(id: InstanceId) -> Option<(Pid, PathBuf)> {
    let network = |process: &Path| fs::read_link(process.join("ns/net")).ok();
    let own = network(Path::new("/proc/self"))?;
    let mut processes = fs::read_dir("/proc").ok()?.flatten();
    processes.find_map(|entry| {
        let pid = entry.file_name().to_str()?.parse().ok()?;
        let directory = entry.path();
        let is_it = is_qemu_of(&directory, id) && network(&directory)? == own;
        is_it.then_some((Pid::from_raw(pid)?, directory))
    })
}

/// libvirt starts every QEMU with `-uuid` and the domain's UUID.
fn is_qemu_of(process: &Path, id: InstanceId) -> bool {
    let line = fs::read(process.join("cmdline")).unwrap_or_default();
    let id = id.to_string();
    let words: Vec<_> = line.split(|byte| *byte == 0).collect();
    words
        .windows(2)
        .any(|pair| pair == [b"-uuid", id.as_bytes()])
}

fn descriptors(process: &Path) -> std::io::Result<Vec<i32>> {
    let names = fs::read_dir(process.join("fd"))?.flatten();
    Ok(names
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .collect())
}

/// Where a descriptor leads, if it is a connection between hosts.
fn peer(held: &OwnedFd) -> Option<SocketAddr> {
    SocketAddr::try_from(getpeername(held).ok()??).ok()
}

#[cfg(test)]
mod tests {
    use std::{
        io::Read,
        net::{TcpListener, TcpStream},
        process::{Command, Stdio},
    };

    use super::*;

    /// A process that looks like the guest's QEMU to us and holds those connections.
    fn qemu(id: InstanceId, held: [TcpStream; 2]) -> std::process::Child {
        let [one, other] = held.map(OwnedFd::from);
        let mut command = Command::new("sh");
        command.args(["-c", "echo held; read line", "-uuid", &id.to_string()]);
        let streams = command.stdin(one).stderr(other).stdout(Stdio::piped());
        let mut child = streams.spawn().unwrap();
        // It is what it is to be once it says something.
        let mut said = [0; 4];
        child.stdout.take().unwrap().read_exact(&mut said).unwrap();
        child
    }

    #[test]
    fn only_what_leads_to_those_ports_of_that_node_is_cut() {
        let id = InstanceId(uuid::Uuid::new_v4());
        let listeners = [(); 2].map(|()| TcpListener::bind("127.0.0.1:0").unwrap());
        let [to, other] = listeners.each_ref().map(|l| l.local_addr().unwrap());
        let held = [to, other].map(|at| TcpStream::connect(at).unwrap());
        let [mut cut, whole] = listeners.map(|l| l.accept().unwrap().0);
        let mut child = qemu(id, held);

        let ports = to.port()..=to.port();
        assert_eq!(sever(id, "127.0.0.2", &ports).unwrap(), 0);
        assert_eq!(sever(id, "localhost", &ports).unwrap(), 1);
        assert_eq!(cut.read(&mut [0]).unwrap(), 0, "it is at its end");
        // Its standard input ended, so it has; the other was open until then.
        assert!(child.wait().is_ok());
        drop(whole);

        let gone = sever(id, "127.0.0.1", &ports);
        assert!(
            matches!(gone, Err(HypervisorError::NoSuchGuest(_))),
            "{gone:?}"
        );
    }
}
