//! Offers of instances to other projects, and their keys. Where an offer stands
//! is never kept: it follows from the instance, the transfer that came of it
//! and the time.

use std::fmt;

use drover_model::{
    api::conductor::{ListOffers, Offer, OfferState},
    ids::{MigrationId, OfferId, ProjectId},
    migration::Requester,
};
use sha2::{Digest, Sha256};
use sqlx::{Row, any::AnyRow};
use subtle::ConstantTimeEq;
use uuid::Uuid;

use crate::{
    Result, Statement, Store, StoreError, corrupt,
    database::Tx,
    from_json,
    instances::{self, InstanceRow, shown},
    migrations::uuid_pattern,
    newer, readable, signed, to_json, unsigned,
};

/// Wrong keys that lock an offer.
pub const MAX_WRONG_KEYS: u32 = 5;
/// Offers that one answer lists at the most.
const MOST_LISTED: i64 = 1000;

/// What the receiver of an offer needs to accept it: 128 random bits. The
/// record keeps its digest alone.
#[derive(Clone, PartialEq, Eq)]
pub struct OfferKey([u8; 16]);

impl OfferKey {
    /// A new one.
    pub fn generate() -> Self {
        // A random UUID has 122 random bits; a digest of two fills the key.
        let random = Sha256::new()
            .chain_update(Uuid::new_v4().as_bytes())
            .chain_update(Uuid::new_v4().as_bytes())
            .finalize();
        let mut key = [0; 16];
        key.copy_from_slice(&random[..16]);
        Self(key)
    }

    /// The key of a text as it is shown; dashes, blanks and case do not matter.
    pub fn parse(text: &str) -> Option<Self> {
        let digits = text.chars().filter(|c| *c != '-' && !c.is_whitespace());
        // One more than there may be is enough to know that it is too long.
        let digits: String = digits.take(33).collect();
        let all_hex = digits.len() == 32 && digits.chars().all(|c| c.is_ascii_hexdigit());
        let number = all_hex.then(|| u128::from_str_radix(&digits, 16).ok())??;
        Some(Self(number.to_be_bytes()))
    }

    /// SHA-256 of it, hexadecimal. A key is random all over: nothing need be
    /// added to keep it from being guessed.
    pub fn digest(&self) -> String {
        hex(&Sha256::digest(self.0))
    }

    /// Whether it is the key of a digest; takes as long whatever the digests have
    /// in common.
    fn fits(&self, digest: &str) -> bool {
        self.digest().as_bytes().ct_eq(digest.as_bytes()).into()
    }
}

/// As it is told to the giver: four groups of eight hexadecimal digits.
impl fmt::Display for OfferKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let groups: Vec<String> = self.0.chunks(4).map(hex).collect();
        f.write_str(&groups.join("-"))
    }
}

impl fmt::Debug for OfferKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("OfferKey(hidden)")
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// An offer to be made.
#[derive(Debug, Clone)]
pub struct NewOffer<'a> {
    /// What is offered, as its giver saw it.
    pub instance: &'a InstanceRow,
    /// Who alone may accept; whoever has the key if nobody is named.
    pub to_project: Option<ProjectId>,
    /// Who offers.
    pub offered_by: Requester,
    /// Now, milliseconds since 1970.
    pub now_ms: u64,
    /// Until when it can be accepted, milliseconds since 1970.
    pub expires_at_ms: u64,
}

/// What came of trying a key.
#[derive(Debug, Clone, PartialEq)]
pub enum KeyTried {
    /// It is the offer's.
    Right(Box<Offer>),
    /// It is not; that was counted.
    Wrong {
        /// The offer as it is now.
        offer: Box<Offer>,
        /// How many more may be tried.
        left: u32,
    },
    /// The offer cannot be accepted; the key was not looked at.
    NotOpen(Box<Offer>),
}

/// A query of offers with their states. `$1` is the time, `$2` the number of
/// wrong keys that locks.
macro_rules! offers_now {
    ($rest:literal) => {
        concat!(
            "SELECT * FROM (SELECT o.*, CASE WHEN o.withdrawn = 1 THEN 'withdrawn' \
             WHEN m.status NOT IN ('failed', 'cancelled') THEN 'accepted' \
             WHEN o.wrong_keys >= $2 THEN 'locked' WHEN o.expires_at_ms <= $1 THEN 'expired' \
             WHEN i.uuid IS NULL OR i.project_id <> o.from_project THEN 'void' \
             ELSE 'open' END AS state FROM offers o \
             LEFT JOIN migrations m ON m.uuid = o.migration_uuid \
             LEFT JOIN instances i ON i.uuid = o.instance_uuid) AS now ",
            $rest
        )
    };
}

impl Store {
    /// Makes an offer, with the key that accepts it; or says which open one
    /// there is of that instance already.
    ///
    /// # Errors
    /// [`StoreError::Conflict`] if the instance is gone or another project's by
    /// now, or the database failed.
    pub async fn create_offer(
        &self,
        new: &NewOffer<'_>,
    ) -> Result<std::result::Result<(Offer, OfferKey), Offer>> {
        let tried = self.attempt(|| self.try_create_offer(new)).await?;
        let gone = || StoreError::Conflict(format!("instance {}", new.instance.id));
        tried.ok_or_else(gone)
    }

    /// Nothing if the instance is no longer as its giver saw it.
    async fn try_create_offer(
        &self,
        new: &NewOffer<'_>,
    ) -> Result<Option<std::result::Result<(Offer, OfferKey), Offer>>> {
        let mut tx = self.begin().await?;
        // Two that offer the same instance wait for each other here.
        let held = instances::lock(&mut tx, new.instance.id).await?;
        if held.is_none_or(|held| held.project != new.instance.project) {
            return Ok(None);
        }
        let open = sqlx::query(offers_now!("WHERE state = 'open' AND instance_uuid = $3"))
            .bind(signed(new.now_ms))
            .bind(i64::from(MAX_WRONG_KEYS))
            .bind(new.instance.id.to_string())
            .fetch_optional(&mut *tx)
            .await?;
        if let Some(row) = open {
            return Ok(Some(Err(offer(&row)?)));
        }
        let (id, key) = (OfferId::generate(), OfferKey::generate());
        insert(&mut tx, id, &key, new).await?;
        let made = load(&mut tx, id, new.now_ms).await?;
        tx.commit().await?;
        Ok(Some(Ok((made, key))))
    }

    /// The offer of a UUID, or a unique prefix of one (4 characters at least).
    ///
    /// # Errors
    /// [`StoreError::NotFound`], [`StoreError::Ambiguous`], or the database failed.
    pub async fn find_offer(&self, reference: &str, now_ms: u64) -> Result<Offer> {
        let work = async {
            let mut tx = self.begin().await?;
            find(&mut tx, reference, now_ms).await
        };
        self.steady(work).await
    }

    /// Offers, newest first; 1000 at the most.
    ///
    /// # Errors
    /// The database failed.
    pub async fn offers(&self, filter: &ListOffers, now_ms: u64) -> Result<Vec<Offer>> {
        let query = sqlx::query(offers_now!(
            "WHERE (CAST($3 AS TEXT) IS NULL OR from_project = $3 OR to_project = $3) \
             AND ($4 = 1 OR state = 'open') ORDER BY created_at_ms DESC, id DESC LIMIT $5"
        ))
        .bind(signed(now_ms))
        .bind(i64::from(MAX_WRONG_KEYS))
        .bind(filter.project.as_deref())
        .bind(i64::from(filter.all))
        .bind(MOST_LISTED);
        let rows = self.steady(query.fetch_all(&self.database)).await?;
        Ok(readable(&rows, offer))
    }

    /// Takes an open offer back.
    ///
    /// # Errors
    /// [`StoreError::Invalid`] if it is no longer open, [`StoreError::NotFound`],
    /// [`StoreError::Ambiguous`], or the database failed.
    pub async fn withdraw_offer(&self, reference: &str, now_ms: u64) -> Result<Offer> {
        self.attempt(|| async {
            let mut tx = self.begin().await?;
            let id = find(&mut tx, reference, now_ms).await?.id;
            let offer = lock(&mut tx, id, now_ms).await?;
            if offer.state != OfferState::Open {
                return Err(StoreError::Invalid(format!(
                    "offer {id} is {}; only an open one can be withdrawn",
                    offer.state.as_str()
                )));
            }
            sqlx::query("UPDATE offers SET withdrawn = 1 WHERE id = $1")
                .bind(id.to_string())
                .execute(&mut *tx)
                .await?;
            let offer = load(&mut tx, id, now_ms).await?;
            tx.commit().await?;
            Ok(offer)
        })
        .await
    }

    /// Tries a key on an offer. A text that is no key at all is a wrong one.
    ///
    /// # Errors
    /// [`StoreError::NotFound`], [`StoreError::Ambiguous`], or the database failed.
    pub async fn try_key(&self, reference: &str, key: &str, now_ms: u64) -> Result<KeyTried> {
        self.attempt(|| self.try_key_once(reference, key, now_ms))
            .await
    }

    async fn try_key_once(&self, reference: &str, key: &str, now_ms: u64) -> Result<KeyTried> {
        let mut tx = self.begin().await?;
        let id = find(&mut tx, reference, now_ms).await?.id;
        // Tries wait for each other here: none goes uncounted.
        let offer = lock(&mut tx, id, now_ms).await?;
        if offer.state != OfferState::Open {
            return Ok(KeyTried::NotOpen(Box::new(offer)));
        }
        let row = sqlx::query("SELECT key_digest FROM offers WHERE id = $1")
            .bind(id.to_string())
            .fetch_one(&mut *tx)
            .await?;
        let digest: String = row.try_get("key_digest")?;
        if OfferKey::parse(key).is_some_and(|key| key.fits(&digest)) {
            return Ok(KeyTried::Right(Box::new(offer)));
        }
        sqlx::query("UPDATE offers SET wrong_keys = wrong_keys + 1 WHERE id = $1")
            .bind(id.to_string())
            .execute(&mut *tx)
            .await?;
        let offer = Box::new(load(&mut tx, id, now_ms).await?);
        tx.commit().await?;
        let left = MAX_WRONG_KEYS.saturating_sub(offer.wrong_keys);
        Ok(KeyTried::Wrong { offer, left })
    }
}

/// Forgets offers that nobody can accept any more and that were made before a moment,
/// but for those whose transfer is under way.
pub(crate) fn forget_closed<'q>(made_before_ms: i64, now_ms: u64, most: i64) -> Statement<'q> {
    sqlx::query(sqlx::AssertSqlSafe(format!(
        "DELETE FROM offers WHERE id IN (SELECT id FROM ({}) AS closed LIMIT $4)",
        offers_now!(
            "WHERE state <> 'open' AND created_at_ms < $3 AND NOT EXISTS \
             (SELECT 1 FROM migrations t WHERE t.uuid = now.migration_uuid AND t.active = 1)"
        )
    )))
    .bind(signed(now_ms))
    .bind(i64::from(MAX_WRONG_KEYS))
    .bind(made_before_ms)
    .bind(most)
}

async fn insert(tx: &mut Tx, id: OfferId, key: &OfferKey, new: &NewOffer<'_>) -> Result<()> {
    sqlx::query(
        "INSERT INTO offers (id, instance_uuid, instance_name, from_project, to_project, \
         key_digest, offered_by, created_at_ms, expires_at_ms, wrong_keys, withdrawn) \
         VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, 0, 0)",
    )
    .bind(id.to_string())
    .bind(new.instance.id.to_string())
    .bind(&new.instance.name)
    .bind(&new.instance.project)
    .bind(new.to_project.as_ref().map(ProjectId::as_str))
    .bind(key.digest())
    .bind(to_json("an offer", &new.offered_by)?)
    .bind(signed(new.now_ms))
    .bind(signed(new.expires_at_ms))
    .execute(&mut **tx)
    .await?;
    Ok(())
}

/// Holds an offer against all who would change it until this commit, and says
/// where it stands.
pub(crate) async fn lock(tx: &mut Tx, id: OfferId, now_ms: u64) -> Result<Offer> {
    sqlx::query("UPDATE offers SET wrong_keys = wrong_keys WHERE id = $1")
        .bind(id.to_string())
        .execute(&mut **tx)
        .await?;
    load(tx, id, now_ms).await
}

/// Remembers which transfer came of an offer.
pub(crate) async fn take(tx: &mut Tx, id: OfferId, migration: MigrationId) -> Result<()> {
    sqlx::query("UPDATE offers SET migration_uuid = $2 WHERE id = $1")
        .bind(id.to_string())
        .bind(migration.to_string())
        .execute(&mut **tx)
        .await?;
    Ok(())
}

async fn load(tx: &mut Tx, id: OfferId, now_ms: u64) -> Result<Offer> {
    find(tx, &id.to_string(), now_ms).await
}

async fn find(tx: &mut Tx, reference: &str, now_ms: u64) -> Result<Offer> {
    let rows = sqlx::query(offers_now!("WHERE id LIKE $3 LIMIT 2"))
        .bind(signed(now_ms))
        .bind(i64::from(MAX_WRONG_KEYS))
        .bind(uuid_pattern(reference).unwrap_or_default())
        .fetch_all(&mut **tx)
        .await?;
    match rows.as_slice() {
        [] => Err(StoreError::NotFound(format!(
            "offer '{}'",
            shown(reference)
        ))),
        [row] => offer(row),
        _ => Err(StoreError::Ambiguous(format!(
            "'{}' fits several offers; give more of the UUID",
            shown(reference)
        ))),
    }
}

fn offer(row: &AnyRow) -> Result<Offer> {
    let wrong = |error: &dyn fmt::Display| corrupt("an offer", error);
    let id: String = row.try_get("id")?;
    let instance: String = row.try_get("instance_uuid")?;
    let to_project: Option<String> = row.try_get("to_project")?;
    let migration: Option<String> = row.try_get("migration_uuid")?;
    let state: String = row.try_get("state")?;
    let to_project = to_project.map(|id| id.parse()).transpose();
    let migration = migration.map(|id| id.parse()).transpose();
    Ok(Offer {
        id: id.parse().map_err(|e| wrong(&e))?,
        instance_uuid: instance.parse().map_err(|e| wrong(&e))?,
        instance_name: row.try_get("instance_name")?,
        from_project: row.try_get("from_project")?,
        to_project: to_project.map_err(|e| wrong(&e))?,
        state: serde_json::from_value(state.into()).map_err(|e| newer("an offer", &e))?,
        offered_by: from_json("an offer", row.try_get("offered_by")?)?,
        created_at_ms: unsigned(row.try_get("created_at_ms")?),
        expires_at_ms: unsigned(row.try_get("expires_at_ms")?),
        wrong_keys: u32::try_from(row.try_get::<i64, _>("wrong_keys")?).unwrap_or(u32::MAX),
        migration: migration.map_err(|e| wrong(&e))?,
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)] // all of it is test

    use super::*;

    #[test]
    fn a_key_reads_back_however_it_was_copied() {
        let key = OfferKey::generate();
        let text = key.to_string();
        assert_eq!(text.len(), 35, "{text}");
        for copy in [
            text.clone(),
            text.to_uppercase(),
            text.replace('-', ""),
            format!(" {} ", text.replace('-', " ")),
        ] {
            assert_eq!(OfferKey::parse(&copy).unwrap(), key, "{copy}");
        }
        for wrong in [
            "",
            "-",
            &text[1..],
            &format!("{text}0"),
            &text.replace('-', "+"),
        ] {
            assert_eq!(OfferKey::parse(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn a_key_fits_its_own_digest_alone() {
        let (key, other) = (OfferKey::generate(), OfferKey::generate());
        assert_ne!(key, other);
        assert!(key.fits(&key.digest()));
        assert!(!key.fits(&other.digest()));
        assert!(!key.fits(&key.digest()[..63]));
        assert!(!key.fits(""));
    }

    #[test]
    fn a_key_is_not_logged() {
        let key = OfferKey::generate();
        let logged = format!("{key:?}").replace('-', "");
        assert!(!logged.contains(&key.to_string()[..8]), "{logged}");
        // The digest is of the key, and SHA-256.
        let zero = OfferKey::parse(&"0".repeat(32)).unwrap();
        assert_eq!(
            zero.digest(),
            "374708fff7719dd5979ec875d56cd2286f6d3cf7ec317a3b25632aab28ec37bb"
        );
    }
}
