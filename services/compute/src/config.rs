//! The `[compute]` section: plain data, units in the names, checked to the end
//! before anything starts. The keys of [`LibvirtSettings`] stand in it too.

use std::{net::IpAddr, path::PathBuf};

use drover_model::{
    api::SPEAKS,
    ids::HostName,
    node::{AllocationPolicy, Endpoint},
};
use drover_runtime::config::{ConfigError, Document};
use serde::{Deserialize, de::DeserializeOwned};
use serde_json::{Map, Value};

use crate::{hypervisor::libvirt::LibvirtSettings, journal::StateDisk, node::AgentSettings};

const SECTION: &str = "compute";
/// The kernel's name for this boot.
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";
const MACHINE_ID: &str = "/etc/machine-id";

/// What the section says about the agent itself.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Section {
    /// Name of the node. Default: the machine's host name.
    host: Option<String>,
    /// Address or name by which other nodes reach this one. Default: `host`.
    migration_address: Option<String>,
    /// How other nodes' libvirtd speaks to this one's: `tcp`, `tls` or `ssh`.
    libvirt_scheme: Scheme,
    /// TCP port of that. Default: what the scheme has.
    libvirt_port: Option<u16>,
    /// Where the agent keeps its journal.
    state_dir: PathBuf,
    /// Time between reports, seconds.
    report_interval_s: u64,
    /// vCPUs that may be given out per logical CPU.
    cpu_allocation_ratio: f64,
    /// Guest memory that may be given out per MiB of the host's.
    ram_allocation_ratio: f64,
    /// Kept for the host itself, MiB.
    reserved_memory_mib: u64,
    /// Downtime of a migration that asks for none in particular, ms.
    max_downtime_ms: u64,
    /// A migration that gets no nearer to its end for so long is given up, seconds.
    progress_timeout_s: u64,
    /// Whether the agent starts guests at boot in libvirt's stead, having asked
    /// the conductor: libvirt asks nobody.
    guard_autostart: bool,
    /// A file that holds another text after each boot of the node.
    boot_id_file: PathBuf,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Scheme {
    Tcp,
    Tls,
    Ssh,
}

impl Scheme {
    fn parts(self) -> (&'static str, u16) {
        match self {
            Self::Tcp => ("tcp", 16509),
            Self::Tls => ("tls", 16514),
            Self::Ssh => ("ssh", 22),
        }
    }
}

impl Default for Section {
    fn default() -> Self {
        let policy = AllocationPolicy::default();
        Self {
            host: None,
            migration_address: None,
            libvirt_scheme: Scheme::Tcp,
            libvirt_port: None,
            state_dir: PathBuf::from("/var/lib/drover"),
            report_interval_s: 5,
            cpu_allocation_ratio: policy.cpu_allocation_ratio,
            ram_allocation_ratio: policy.ram_allocation_ratio,
            reserved_memory_mib: policy.reserved_memory_mib,
            max_downtime_ms: 500,
            progress_timeout_s: 150,
            guard_autostart: true,
            boot_id_file: PathBuf::from(BOOT_ID),
        }
    }
}

/// Settings of this process, apart from messaging and log.
#[derive(Debug, Clone)]
pub struct ComputeSettings {
    /// The agent's.
    pub agent: AgentSettings,
    /// The driver's.
    pub libvirt: LibvirtSettings,
}

/// Reads and checks the section.
///
/// # Errors
/// A key is unknown or its value cannot be; the error names file, key and remedy.
pub fn read(document: &Document) -> Result<ComputeSettings, ConfigError> {
    let (own, drivers): (Map<_, _>, Map<_, _>) = document
        .section::<Map<String, Value>>(SECTION)?
        .into_iter()
        .partition(|(key, _)| !is_drivers(key));
    let section: Section = part(document, own)?;
    let libvirt: LibvirtSettings = part(document, drivers)?;
    libvirt
        .check()
        .map_err(|e| document.bad_key(SECTION, "libvirt", &e.to_string()))?;
    let agent =
        settings(section).map_err(|(key, problem)| document.bad_key(SECTION, key, &problem))?;
    Ok(ComputeSettings { agent, libvirt })
}

fn is_drivers(key: &str) -> bool {
    let keys = serde_json::to_value(LibvirtSettings::default()).unwrap_or_default();
    keys.get(key).is_some()
}

fn part<T: DeserializeOwned>(
    document: &Document,
    part: Map<String, Value>,
) -> Result<T, ConfigError> {
    serde_path_to_error::deserialize(Value::Object(part)).map_err(|e| {
        let key = e.path().to_string();
        document.bad_key(SECTION, &key, &e.inner().to_string())
    })
}

type Problem = (&'static str, String);

fn settings(section: Section) -> Result<AgentSettings, Problem> {
    check_bounds(&section)?;
    let host = host(section.host.as_deref())?;
    let address = match section.migration_address {
        Some(address) => checked_address(address)?,
        None => host.to_string(),
    };
    let (scheme, usual_port) = section.libvirt_scheme.parts();
    let port = section.libvirt_port.unwrap_or(usual_port);
    Ok(AgentSettings {
        endpoint: Endpoint {
            libvirt_uri: uri(scheme, &address, (port != usual_port).then_some(port)),
            libvirt_port: port,
            address,
        },
        host,
        policy: AllocationPolicy {
            cpu_allocation_ratio: section.cpu_allocation_ratio,
            ram_allocation_ratio: section.ram_allocation_ratio,
            reserved_memory_mib: section.reserved_memory_mib,
        },
        state_dir: section.state_dir,
        state_disk: StateDisk::default(),
        report_interval_s: section.report_interval_s,
        max_downtime_ms: section.max_downtime_ms,
        progress_timeout_s: section.progress_timeout_s,
        guard_autostart: section.guard_autostart,
        boot_id_file: section.boot_id_file,
        machine_id_file: PathBuf::from(MACHINE_ID),
        speaks: SPEAKS,
    })
}

fn check_bounds(section: &Section) -> Result<(), Problem> {
    let whole = [
        ("report_interval_s", section.report_interval_s, 1, 300),
        // As the options of a single migration.
        ("max_downtime_ms", section.max_downtime_ms, 1, 60_000),
        ("progress_timeout_s", section.progress_timeout_s, 5, 86_400),
    ];
    for (key, value, low, high) in whole {
        if !(low..=high).contains(&value) {
            return Err((key, format!("is {value}; it may be {low} to {high}")));
        }
    }
    let ratios = [
        ("cpu_allocation_ratio", section.cpu_allocation_ratio),
        ("ram_allocation_ratio", section.ram_allocation_ratio),
    ];
    for (key, value) in ratios {
        if !(value > 0.0 && value <= 1000.0) {
            return Err((key, format!("is {value}; it may be above 0 and up to 1000")));
        }
    }
    if section.libvirt_port == Some(0) {
        return Err(("libvirt_port", "is 0; it may be 1 to 65535".to_owned()));
    }
    for (key, path) in [
        ("state_dir", &section.state_dir),
        ("boot_id_file", &section.boot_id_file),
    ] {
        if !path.is_absolute() {
            let path = path.display();
            return Err((key, format!("is '{path}'; give an absolute path")));
        }
    }
    Ok(())
}

fn host(given: Option<&str>) -> Result<HostName, Problem> {
    let name = match given {
        Some(name) => name.to_owned(),
        None => std::fs::read_to_string("/proc/sys/kernel/hostname").map_err(|e| {
            (
                "host",
                format!("the machine's name cannot be read ({e}); set it here"),
            )
        })?,
    };
    name.trim()
        .parse()
        .map_err(|e| ("host", format!("{e}; set another")))
}

fn checked_address(address: String) -> Result<String, Problem> {
    let sound = address.parse::<IpAddr>().is_ok() || address.parse::<HostName>().is_ok();
    match sound {
        true => Ok(address),
        false => {
            let shown: String = address.chars().take(80).collect();
            let problem = format!("is '{shown}'; give an IP address or a host name without port");
            Err(("migration_address", problem))
        }
    }
}

fn uri(scheme: &str, address: &str, port: Option<u16>) -> String {
    let host = match address.contains(':') {
        true => format!("[{address}]"),
        false => address.to_owned(),
    };
    let port = port.map_or(String::new(), |port| format!(":{port}"));
    format!("qemu+{scheme}://{host}{port}/system")
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn read_text(text: &str) -> Result<ComputeSettings, String> {
        let document = Document::parse(Path::new("drover.toml"), text).unwrap();
        read(&document).map_err(|e| e.to_string())
    }

    #[test]
    fn a_short_section_is_enough() {
        let read = read_text(
            "[compute]\nhost = 'kvm1'\nmigration_address = '100.100.100.11'\n\
             libvirt_uri = 'qemu:///session'\n",
        );
        let ComputeSettings { agent, libvirt } = read.unwrap();
        assert_eq!(agent.host.as_str(), "kvm1");
        assert_eq!(
            agent.endpoint.libvirt_uri,
            "qemu+tcp://100.100.100.11/system"
        );
        assert_eq!(agent.endpoint.libvirt_port, 16509);
        assert_eq!(libvirt.libvirt_uri, "qemu:///session");
        assert!(read_text("").is_ok(), "defaults alone are sound");
    }

    #[test]
    fn the_address_of_this_node_has_its_forms() {
        let of = |text: &str| read_text(text).unwrap().agent.endpoint;
        let named = of("[compute]\nhost = 'a.example'\nlibvirt_scheme = 'tls'\n");
        assert_eq!(named.libvirt_uri, "qemu+tls://a.example/system");
        assert_eq!(
            (named.address.as_str(), named.libvirt_port),
            ("a.example", 16514)
        );
        let six = of("[compute]\nhost = 'a'\nmigration_address = 'fd00::1'\nlibvirt_port = 1\n");
        assert_eq!(six.libvirt_uri, "qemu+tcp://[fd00::1]:1/system");
    }

    #[test]
    fn what_cannot_be_is_named_with_file_key_and_remedy() {
        for (line, expected) in [
            ("hots = 'a'", "unknown field `hots`"),
            ("host = 'a b'", "[compute] host: 'a b' is not a host name"),
            (
                "migration_address = 'kvm1:1'",
                "[compute] migration_address: is 'kvm1:1'",
            ),
            (
                "report_interval_s = 0",
                "[compute] report_interval_s: is 0; it may be 1 to 300",
            ),
            (
                "report_interval_s = '5'",
                "[compute] report_interval_s: invalid type",
            ),
            (
                "cpu_allocation_ratio = 0.0",
                "[compute] cpu_allocation_ratio: is 0",
            ),
            (
                "libvirt_scheme = 'udp'",
                "[compute] libvirt_scheme: unknown variant `udp`",
            ),
            (
                "state_dir = 'here'",
                "[compute] state_dir: is 'here'; give an absolute path",
            ),
            ("call_timeout_s = 0", "call_timeout_s must be"),
            (
                "call_timeout_s = 'x'",
                "[compute] call_timeout_s: invalid type",
            ),
        ] {
            let error = read_text(&format!("[compute]\n{line}\n")).unwrap_err();
            assert!(error.contains(expected), "{error}");
            assert!(
                error.starts_with("drover.toml: ") && !error.contains('\n'),
                "{error}"
            );
        }
    }
}
