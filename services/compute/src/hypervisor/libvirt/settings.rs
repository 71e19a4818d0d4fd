//! The settings of the libvirt driver, with defaults that suit a plain node.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::hypervisor::{HypervisorError, Result};

/// How the driver reaches libvirt and what it may use of the node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LibvirtSettings {
    /// libvirt's URI on this node.
    pub libvirt_uri: String,
    /// First TCP port that libvirt uses for migrations (`migration_port_min` in `qemu.conf`).
    pub migration_port_min: u16,
    /// Last such port.
    pub migration_port_max: u16,
    /// Address on which a probe port is opened: this node's on the migration network.
    pub probe_listen_address: String,
    /// TCP port at which disks of guests that are off are taken in, on that
    /// address; 0 takes any.
    pub disk_port: u16,
    /// How long a probe port stays open, seconds.
    pub probe_open_s: u64,
    /// How long a connection to another node may take, seconds.
    pub reach_timeout_s: u64,
    /// Directory whose file system is reported as the node's disk.
    pub instances_path: String,
    /// Further directories whose images may lie under guests' disks.
    pub image_paths: Vec<String>,
    /// Name or path of `qemu-img`.
    pub qemu_img: String,
    /// How long creating an image may take, seconds.
    pub qemu_img_timeout_s: u64,
    /// How long any call but a migration may take, seconds.
    pub call_timeout_s: u64,
    /// Pause between signs of life on an idle connection, seconds.
    pub keepalive_interval_s: u64,
    /// Signs of life missed before the connection counts as lost.
    pub keepalive_count: u32,
    /// First pause before a lost libvirt is sought again, milliseconds; it doubles.
    pub reconnect_min_ms: u64,
    /// Longest such pause, milliseconds.
    pub reconnect_max_ms: u64,
    /// Where what was seen of storage is kept over a restart; nowhere if none.
    #[serde(skip)]
    pub memory_file: Option<PathBuf>,
}

impl Default for LibvirtSettings {
    fn default() -> Self {
        Self {
            libvirt_uri: "qemu:///system".to_owned(),
            migration_port_min: 49152,
            migration_port_max: 49215,
            probe_listen_address: "0.0.0.0".to_owned(),
            disk_port: 49215,
            probe_open_s: 10,
            reach_timeout_s: 3,
            instances_path: "/var/lib/libvirt/images".to_owned(),
            image_paths: Vec::new(),
            qemu_img: "qemu-img".to_owned(),
            qemu_img_timeout_s: 60,
            call_timeout_s: 20,
            keepalive_interval_s: 5,
            keepalive_count: 3,
            reconnect_min_ms: 200,
            reconnect_max_ms: 10_000,
            memory_file: None,
        }
    }
}

impl LibvirtSettings {
    /// Checks what serde cannot.
    ///
    /// # Errors
    /// `Failed`, naming the setting.
    pub fn check(&self) -> Result<()> {
        let bad = |text: String| Err(HypervisorError::Failed(text));
        if self.libvirt_uri.is_empty() || self.libvirt_uri.contains('\0') {
            return bad("libvirt_uri is empty or holds a NUL".to_owned());
        }
        if self.migration_port_min == 0 || self.migration_port_min > self.migration_port_max {
            return bad(format!(
                "migration_port_min ({}) and migration_port_max ({}) are no range",
                self.migration_port_min, self.migration_port_max
            ));
        }
        let paths = std::iter::once(&self.instances_path).chain(&self.image_paths);
        if let Some(path) = paths.into_iter().find(|path| !path.starts_with('/')) {
            return bad(format!("'{path}' is no absolute path"));
        }
        let positive = [
            ("call_timeout_s", self.call_timeout_s),
            ("qemu_img_timeout_s", self.qemu_img_timeout_s),
            ("reach_timeout_s", self.reach_timeout_s),
            ("probe_open_s", self.probe_open_s),
            ("keepalive_interval_s", self.keepalive_interval_s),
            ("keepalive_count", u64::from(self.keepalive_count)),
            ("reconnect_min_ms", self.reconnect_min_ms),
        ];
        if let Some((name, _)) = positive.iter().find(|(_, v)| *v == 0 || *v > 86_400) {
            return bad(format!("{name} must be between 1 and 86400"));
        }
        if self.reconnect_max_ms < self.reconnect_min_ms {
            return bad("reconnect_max_ms is less than reconnect_min_ms".to_owned());
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn defaults_are_sound_and_unknown_names_are_refused() {
        LibvirtSettings::default().check().unwrap();
        let read: LibvirtSettings = serde_json::from_str("{}").unwrap();
        assert_eq!(read, LibvirtSettings::default());
        assert!(serde_json::from_str::<LibvirtSettings>(r#"{"uri": "x"}"#).is_err());
    }

    #[test]
    fn nonsense_is_named() {
        let settings = LibvirtSettings {
            migration_port_min: 2,
            migration_port_max: 1,
            ..LibvirtSettings::default()
        };
        let text = settings.check().unwrap_err().to_string();
        assert!(text.contains("migration_port_min"), "{text}");
    }
}
