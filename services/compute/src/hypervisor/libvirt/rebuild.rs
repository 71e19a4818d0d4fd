//! Guests of dead nodes: what is kept of a definition, and a guest defined anew
//! from that. The closures block; what they do is one act each.

use std::{fs, io::ErrorKind, os::unix::fs::MetadataExt, time::Duration};

use async_trait::async_trait;
use drover_model::{
    api::compute::{KeptDefinition, StorageIdentity},
    guest::{Guest, GuestFileKind, Presence},
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
    ffi, guests, standing,
    storage::identity,
    usage,
    xml::{self, notes},
};
use crate::hypervisor::{ColdDriver, HypervisorError, RebuildDriver, Result, StorageFact};

/// How long a dirty rate is measured, seconds.
const MEASURING_S: i32 = 1;
/// How often its end is looked for.
const LOOK: Duration = Duration::from_millis(200);
/// How long until it counts as never.
const LONGEST_MEASURING: Duration = Duration::from_secs(10);

/// A fingerprint of a lasting definition and of the files that its disks are: one
/// that was put in another's place is another on its storage. None while a file
/// cannot be looked at: what is known of it is not to be lost over that.
pub(super) fn digest(text: &str) -> Option<String> {
    let mut hash = Sha256::new_with_prefix(text);
    for (_, path) in xml::disk_files(text).ok()? {
        let number = match fs::metadata(&path) {
            Ok(file) => Some(file.ino()),
            Err(error) if error.kind() == ErrorKind::NotFound => None,
            Err(_) => return None,
        };
        hash.update(format!("{path} {number:?}"));
    }
    Some(format!("{:x}", hash.finalize()))
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
        let words = format!("the guest is here already: {presence:?}, generation {here}");
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

#[async_trait]
impl RebuildDriver for LibvirtDriver {
    async fn kept_definition(&self, id: InstanceId) -> Result<KeptDefinition> {
        let take = move |connect: &_| text_of(connect, id);
        let (domain, has_secrets) = self.calls.guest(Effect::Read, id, take).await?;
        let guest = self.lasting_guest(id).await?;
        let guest = guest.ok_or(HypervisorError::NoSuchGuest(id))?;
        let look = move || {
            let unseen = || HypervisorError::Failed("a disk cannot be looked at".to_owned());
            Ok(KeptDefinition {
                instance: id,
                digest: digest(&domain).ok_or_else(unseen)?,
                has_secrets,
                identities: identities(&guest),
                domain,
                guest,
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
        let text = format!(
            "<domain><devices><disk type='file' device='disk'><source file='{}'/>\
             <target dev='vda'/></disk></devices></domain>",
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
    }
}
