//! Guests of dead nodes: what is kept of a definition, and a guest defined anew
//! from that. The closures block; what they do is one act each.

use std::{fs, io::ErrorKind, os::unix::fs::MetadataExt, time::Duration};

use async_trait::async_trait;
use drover_model::{
    api::compute::{KeptDefinition, StorageIdentity},
    content::{self, FileContent, Seen, UseRole},
    guest::{Guest, GuestFileKind, PowerState, Presence},
    ids::InstanceId,
};
use sha2::{Digest, Sha256};
use tokio::time::{Instant, sleep};
use virt::{
    connect::Connect,
    error::{Error, ErrorNumber},
    sys,
};

use super::{
    LibvirtDriver,
    blocking::Effect,
    errors::{self, CallResult},
    ffi,
    guests::{self, Found},
    standing,
    storage::{
        chain::{self, Places},
        content as contents, identity,
        measure::Measurer,
    },
    usage,
    xml::{self, notes},
};
use crate::hypervisor::{
    ColdDriver, Hypervisor, HypervisorError, RebuildDriver, Result, StorageFact,
};

/// How long a dirty rate is measured, seconds.
const MEASURING_S: i32 = 1;
/// Longest file whose digest is kept for the day on which its node is dead, bytes.
const MOST_KEPT_BYTES: u64 = 64 << 30;
/// How long digests are waited for that are kept; those that take longer are asked
/// for again.
const KEPT_AT_ONCE: Duration = Duration::from_millis(200);
/// How often its end is looked for.
const LOOK: Duration = Duration::from_millis(200);
/// How long until it counts as never.
const LONGEST_MEASURING: Duration = Duration::from_secs(10);

/// A fingerprint of a lasting definition and of the files that it names: a disk
/// that was put in another's place is another on its storage, and a file that is
/// only read is another when it was written. None while a file cannot be looked
/// at: what is known of it is not to be lost over that.
pub(super) fn digest(text: &str) -> Option<String> {
    let files = files_of(text)?.into_iter();
    let seen: Option<Vec<String>> = files.map(|(path, how)| seen(&path, &how)).collect();
    Some(fingerprint(text, &seen?))
}

/// The same of many, without waiting for storage that does not answer; of domains that
/// could be read.
pub(super) async fn digests(found: &[Found], measurer: &Measurer) -> Vec<Option<String>> {
    let whole = found.iter().filter_map(|found| match found {
        Found::Whole(whole) => Some(whole.lasting.as_str()),
        Found::Unreadable(_) => None,
    });
    let named: Vec<_> = whole.map(|text| (text, files_of(text))).collect();
    let files = named.iter().flat_map(|(_, files)| files.iter().flatten());
    let asked = measurer.ask_each(files.cloned().collect(), seen).await;
    let mut answers = asked.into_iter().map(|answer| answer.ok().flatten());
    let digest = |(text, files): &(&str, Option<Vec<_>>)| {
        let count = files.as_ref()?.len();
        // All of them, so that the next one's come next.
        let seen: Vec<Option<String>> = answers.by_ref().take(count).collect();
        let seen: Option<Vec<String>> = seen.into_iter().collect();
        Some(fingerprint(text, &seen?))
    };
    named.iter().map(digest).collect()
}

pub(super) fn fingerprint(text: &str, seen: &[String]) -> String {
    let mut hash = Sha256::new_with_prefix(text);
    for line in seen {
        hash.update(line);
    }
    format!("{:x}", hash.finalize())
}

/// How a definition's guest uses a file.
#[derive(Debug, Clone)]
enum How {
    /// It writes it.
    Writes,
    /// It only reads it.
    Reads,
    /// A drive's own image, of that format, with images under it.
    Drive { format: String, is_written: bool },
}

/// What is seen of a file, as a line. Blocks.
fn seen(path: &str, how: &How) -> Option<String> {
    let number = || match fs::metadata(path) {
        Ok(file) => Some(Some(file.ino().to_string())),
        Err(error) if error.kind() == ErrorKind::NotFound => Some(None),
        Err(_) => None,
    };
    let own = match how {
        How::Writes
        | How::Drive {
            is_written: true, ..
        } => number()?,
        How::Reads
        | How::Drive {
            is_written: false, ..
        } => contents::stamp(path).ok()?,
    };
    let mut line = format!("{path} {own:?}");
    if let How::Drive { format, .. } = how {
        // Wherever a chain leads: it is only looked at.
        let below = chain::below(path, format, &Places(vec!["/".into()]));
        for image in below.unwrap_or_default() {
            let stamp = contents::stamp(&image.path).ok()?;
            line.push_str(&format!("{} {stamp:?}", image.path));
        }
    }
    Some(line)
}

/// The local files of a lasting definition.
fn files_of(text: &str) -> Option<Vec<(String, How)>> {
    let outside = xml::Outside {
        power_state: PowerState::Shutdown,
        persistent: true,
    };
    let guest = xml::guest(text, outside).ok()?;
    let files = guest.uses().into_iter().map(|u| {
        let is_written = matches!(u.role, UseRole::Own | UseRole::SharedDisk);
        let drive = guest.disks.iter().find(|d| d.local_path() == Some(&u.path));
        let how = match (drive, is_written) {
            (Some(disk), is_written) => How::Drive {
                format: disk.format.clone(),
                is_written,
            },
            (None, true) => How::Writes,
            (None, false) => How::Reads,
        };
        (u.path, how)
    });
    Some(files.collect())
}

/// A lasting definition, and whether it has secrets that are not in it.
fn text_of(connect: &Connect, id: InstanceId) -> CallResult<(String, bool)> {
    let domain = guests::get(connect, id)?;
    let text = domain.xml_desc(sys::VIR_DOMAIN_XML_INACTIVE)?;
    let secure = sys::VIR_DOMAIN_XML_INACTIVE | sys::VIR_DOMAIN_XML_SECURE;
    let has_secrets = domain.xml_desc(secure)? != text;
    Ok((text, has_secrets))
}

fn identities(guest: &Guest) -> Vec<StorageIdentity> {
    let disks = guest.disks.iter();
    let images = disks.flat_map(|disk| {
        let below = disk.backing.iter().map(|image| image.path.as_str());
        disk.local_path().into_iter().chain(below)
    });
    let firmware = guest.files.iter().filter(|f| f.kind != GuestFileKind::Tpm);
    let mut paths: Vec<&str> = images.chain(firmware.map(|f| f.path.as_str())).collect();
    paths.sort_unstable();
    paths.dedup();
    let mut identities: Vec<StorageIdentity> = paths.into_iter().map(identity::of).collect();
    // Their directories are libvirt's own, and go with the definition.
    let tpm = guest.files.iter().filter(|f| f.kind == GuestFileKind::Tpm);
    identities.extend(tpm.map(|file| StorageIdentity {
        path: file.path.clone(),
        identity: None,
        error: Some("the state of an emulated TPM is on its node alone".to_owned()),
    }));
    identities
}

/// Defines, or finds that it is done.
fn define(connect: &Connect, id: InstanceId, text: &str, generation: u64) -> CallResult<()> {
    let named = xml::domain_id(text).map_err(HypervisorError::from)?;
    if named != id {
        let words = format!("the definition is {named}'s, not {id}'s");
        return Err(HypervisorError::Failed(words).into());
    }
    let text = notes::of_generation(text, generation).map_err(HypervisorError::from)?;
    if let Some(domain) = guests::find(connect, id)? {
        let presence = standing::presence(&domain)?;
        let here = domain.xml_desc(sys::VIR_DOMAIN_XML_INACTIVE)?;
        let here = notes::read(&here)
            .map_err(HypervisorError::from)?
            .generation;
        if matches!(presence, Presence::Present(_)) && here == generation {
            return Ok(());
        }
        let words = format!("the guest is here already: {presence}, generation {here}");
        return Err(HypervisorError::WrongState(words).into());
    }
    connect.define_domain_xml_flags(&text, 0)?;
    Ok(())
}

/// The wish first, then the flag: whichever moment the agent dies at, a guest
/// that is to be started is known to be.
fn take_over_autostart(connect: &Connect, id: InstanceId) -> CallResult<()> {
    let domain = guests::get(connect, id)?;
    if !domain.autostart()? {
        return Ok(());
    }
    let text = domain.xml_desc(sys::VIR_DOMAIN_XML_INACTIVE)?;
    for change in notes::with_autostart(&text).map_err(HypervisorError::from)? {
        domain.set_metadata(
            i32::try_from(sys::VIR_DOMAIN_METADATA_ELEMENT).unwrap_or_default(),
            change.content.as_deref(),
            Some(&change.prefix),
            Some(&change.namespace),
            sys::VIR_DOMAIN_AFFECT_CONFIG,
        )?;
    }
    Ok(domain.set_autostart(false)?)
}

fn start_measuring(connect: &Connect, id: InstanceId) -> CallResult<bool> {
    let domain = guests::get(connect, id)?;
    match ffi::stats::start_dirty_rate(&domain, MEASURING_S) {
        Err(error) if is_lacking(&error) => Ok(false),
        other => Ok(other?),
    }
}

fn is_lacking(error: &Error) -> bool {
    let lacking = [
        ErrorNumber::NoSupport,
        ErrorNumber::ArgumentUnsupported,
        ErrorNumber::OperationUnsupported,
        ErrorNumber::ConfigUnsupported,
    ];
    lacking.iter().any(|number| errors::is(error, *number))
}

/// The rate, once it is measured.
fn measured(connect: &Connect, id: InstanceId) -> CallResult<Option<u64>> {
    let domain = guests::get(connect, id)?;
    let values = ffi::stats::of_one(&domain, sys::VIR_DOMAIN_STATS_DIRTYRATE)?;
    let status = usage::number(&values, "dirtyrate.calc_status");
    let done = status == Some(sys::VIR_DOMAIN_DIRTYRATE_MEASURED.into());
    let rate = usage::number(&values, "dirtyrate.megabytes_per_second");
    Ok(rate.filter(|_| done))
}

impl LibvirtDriver {
    /// What is in the files that a guest only reads.
    async fn kept_contents(&self, guest: &Guest) -> Result<Vec<FileContent>> {
        let uses = guest.uses().into_iter();
        let read = uses.filter(|u| !matches!(u.role, UseRole::Own | UseRole::SharedDisk));
        let paths: Vec<String> = read.map(|u| u.path).collect();
        let mut found = self.contents(&paths, &[]).await?;
        let is_large = |file: &FileContent| match &file.seen {
            Seen::File { length_bytes, .. } => *length_bytes > MOST_KEPT_BYTES,
            _ => true,
        };
        let small = found.iter().filter(|file| !is_large(file));
        let small: Vec<String> = small.map(|file| file.path.clone()).collect();
        let digested = self.digests_within(&small, KEPT_AT_ONCE).await?;
        for file in &mut found {
            if let Some(digested) = digested.iter().find(|d| d.path == file.path) {
                *file = digested.clone();
            } else if let Seen::File { digest, .. } = &mut file.seen {
                let gib = MOST_KEPT_BYTES >> 30;
                *digest = content::Digest::Failed {
                    error: format!("it was not read beforehand, as it is larger than {gib} GiB"),
                };
            }
        }
        Ok(found)
    }
}

#[async_trait]
impl RebuildDriver for LibvirtDriver {
    async fn kept_definition(&self, id: InstanceId) -> Result<KeptDefinition> {
        let take = move |connect: &_| text_of(connect, id);
        let (domain, has_secrets) = self.calls.guest(Effect::Read, id, take).await?;
        let guest = self.lasting_guest(id).await?;
        let guest = guest.ok_or(HypervisorError::NoSuchGuest(id))?;
        let contents = self.kept_contents(&guest).await?;
        let look = move || {
            let unseen = || HypervisorError::Failed("a disk cannot be looked at".to_owned());
            Ok(KeptDefinition {
                instance: id,
                digest: digest(&domain).ok_or_else(unseen)?,
                has_secrets,
                identities: identities(&guest),
                domain,
                guest,
                contents,
            })
        };
        self.calls.files(Effect::Change, look).await
    }

    async fn storage_facts(&self, identities: &[StorageIdentity]) -> Result<Vec<StorageFact>> {
        let identities = identities.to_vec();
        let look = move || Ok(identities.iter().map(identity::compare).collect());
        self.calls.files(Effect::Read, look).await
    }

    async fn define_rebuilt(&self, id: InstanceId, domain: &str, generation: u64) -> Result<()> {
        let text = domain.to_owned();
        let act = move |connect: &_| define(connect, id, &text, generation);
        self.calls.guest(Effect::Change, id, act).await
    }

    async fn dirty_rate(&self, id: InstanceId) -> Result<Option<u64>> {
        let start = move |connect: &_| start_measuring(connect, id);
        if !self.calls.guest(Effect::Read, id, start).await? {
            return Ok(None);
        }
        let deadline = Instant::now() + LONGEST_MEASURING;
        sleep(Duration::from_secs(MEASURING_S.unsigned_abs().into())).await;
        while Instant::now() < deadline {
            let look = move |connect: &_| measured(connect, id);
            if let Some(rate) = self.calls.guest(Effect::Read, id, look).await? {
                return Ok(Some(rate));
            }
            sleep(LOOK).await;
        }
        Ok(None)
    }

    async fn unguarded_autostarts(&self) -> Result<Vec<InstanceId>> {
        self.calls.node(guests::autostarts).await
    }

    async fn take_over_autostart(&self, id: InstanceId) -> Result<()> {
        let act = move |connect: &_| take_over_autostart(connect, id);
        self.calls.guest(Effect::Change, id, act).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_digest_tells_one_file_from_another_at_its_place() {
        let directory = tempfile::tempdir().unwrap();
        let (disk, other) = (directory.path().join("vda"), directory.path().join("new"));
        let kernel = directory.path().join("kernel");
        let text = format!(
            "<domain type='kvm'><name>a</name><uuid>6f1f3a36-6b3e-4a7e-9f0a-1d9a4b7d0001</uuid>\
             <memory unit='MiB'>1</memory><vcpu>1</vcpu><os><type arch='x86_64'>hvm</type>\
             <kernel>{}</kernel></os><devices><disk type='file' device='disk'>\
             <source file='{}'/><target dev='vda'/></disk></devices></domain>",
            kernel.display(),
            disk.display()
        );
        let none = digest(&text).unwrap();
        fs::write(&disk, "x").unwrap();
        let first = digest(&text).unwrap();
        fs::write(&disk, "what the guest writes").unwrap();
        assert_eq!(digest(&text), Some(first.clone()));
        fs::write(&other, "x").unwrap();
        fs::rename(&other, &disk).unwrap();
        let second = digest(&text).unwrap();
        assert!(none != first && first != second && second != none);
        fs::write(&kernel, "what is only read is another when it is written").unwrap();
        assert_ne!(digest(&text).unwrap(), second);
    }
}
