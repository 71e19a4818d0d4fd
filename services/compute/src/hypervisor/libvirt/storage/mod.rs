//! Disks on this node: how large they are, marks beside them, images made and
//! removed. No libvirt in here but for what callers pass in.
//!
//! Paths come from definitions and from RPC. A path is used only if it is
//! absolute and plain ([`checked`]); its directory is the administrator's, and
//! its last part is never followed if it is a symbolic link.

pub(super) mod beneath;
mod blank;
pub(super) mod chain;
pub(super) mod content;
pub(super) mod files;
#[cfg(feature = "fuzzing")]
pub(super) mod fuzzing;
pub(super) mod identity;
pub(super) mod image;
mod links;
pub(super) mod marks;
pub(super) mod measure;
pub(super) mod memory;
pub(super) mod place;
#[cfg(test)]
mod silence_tests;
pub(super) mod sizes;

use std::{
    os::unix::fs::MetadataExt,
    path::{Component, Path, PathBuf},
};

use crate::hypervisor::{HypervisorError, Result};

/// Longest path that is used, bytes (PATH_MAX with its NUL).
const LONGEST_PATH: usize = 4095;

/// The path, if it is absolute, plain and names something in a directory.
///
/// # Errors
/// `Failed`, saying what is wrong with it.
pub(super) fn checked(path: &str) -> Result<PathBuf> {
    let refuse = |why: &str| {
        let shown: String = path.chars().take(200).collect();
        Err(HypervisorError::Failed(format!("path {shown:?} {why}")))
    };
    if path.len() > LONGEST_PATH {
        return refuse("is too long");
    }
    if path.chars().any(char::is_control) {
        return refuse("holds control characters");
    }
    let parts: Vec<&str> = path.split('/').collect();
    if !path.starts_with('/') {
        return refuse("is not absolute");
    }
    if parts.iter().any(|part| matches!(*part, "." | "..")) {
        return refuse("has '.' or '..' in it");
    }
    if path.ends_with('/') {
        return refuse("names no file");
    }
    Ok(PathBuf::from(path))
}

/// The directory that holds a checked path.
pub(super) fn directory(path: &Path) -> &Path {
    path.parent()
        .unwrap_or(Path::new(Component::RootDir.as_os_str()))
}

/// Which file system a file is on, in words.
pub(super) fn file_system(metadata: &std::fs::Metadata) -> String {
    let device = metadata.dev();
    format!("{}:{}", libc::major(device), libc::minor(device))
}

/// Has what was made, renamed or removed in a path's directory outlive a power cut.
fn sync_directory(path: &Path) {
    let synced = std::fs::File::open(directory(path)).and_then(|d| d.sync_all());
    if let Err(error) = synced {
        tracing::debug!(path = %path.display(), %error, "directory not synced");
    }
}

/// What the file system said about a path.
pub(super) fn failed(what: &str, path: &Path, error: &std::io::Error) -> HypervisorError {
    HypervisorError::Failed(format!("{what} {}: {error}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_plain_absolute_paths_pass() {
        for good in [
            "/a",
            "/var/lib/libvirt/images/a b.qcow2",
            "/srv/a:b,c.img",
            "/a//b",
        ] {
            assert!(checked(good).is_ok(), "{good}");
        }
        let long = format!("/{}", "a".repeat(5000));
        for bad in [
            "", "a", "a/b", "/a/../b", "/..", "/a/./b", "/a/", "/", "/a\0b", "/a\nb", "json:{}",
            "nbd://x", &long,
        ] {
            assert!(checked(bad).is_err(), "{bad:?}");
        }
    }
}
