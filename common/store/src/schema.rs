//! The schema, and who may change it while others are at work.
//!
//! Changes come in two kinds. One that *expands* adds what older programs do not
//! look at: they go on beside it. One that *contracts* takes away what they need,
//! and says in `compatibility` how old a program may be from then on. A program
//! that starts brings the schema up to date if it is alone with the record; else
//! somebody says so with `drover-conductor migrate`, which runs what expands while
//! others work, and what contracts once they are gone.

use std::time::Duration;

use sqlx::{
    Any, AnyConnection, Row,
    migrate::{MigrateError, Migration as SchemaChange, MigrationType, Migrator},
};
use tracing::warn;

/// First half of the key of the lock that every program holds while it uses a
/// record on PostgreSQL; the second is the schema's.
const LOCK: i32 = 0x0d07;
/// The change since which programs hold it.
const LOCKS_SINCE: i64 = 4;

/// What a change does to programs that do not know it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// They go on.
    Expands,
    /// They cannot.
    #[allow(dead_code)] // None has been needed.
    Contracts,
}

/// One change of the schema.
struct Change {
    version: i64,
    name: &'static str,
    kind: Kind,
    sql: &'static str,
}

const CHANGES: &[Change] = &[
    Change {
        version: 1,
        name: "record",
        kind: Kind::Expands,
        sql: include_str!("../migrations/0001_record.sql"),
    },
    Change {
        version: 2,
        name: "projects",
        kind: Kind::Expands,
        sql: include_str!("../migrations/0002_projects.sql"),
    },
    Change {
        version: 3,
        name: "operations",
        kind: Kind::Expands,
        sql: include_str!("../migrations/0003_operations.sql"),
    },
    Change {
        version: 4,
        name: "soundness",
        kind: Kind::Expands,
        sql: include_str!("../migrations/0004_soundness.sql"),
    },
    Change {
        version: 5,
        name: "agents",
        kind: Kind::Expands,
        sql: include_str!("../migrations/0005_agents.sql"),
    },
    Change {
        version: 6,
        name: "fencing",
        kind: Kind::Expands,
        sql: include_str!("../migrations/0006_fencing.sql"),
    },
    Change {
        version: 7,
        name: "cleanups",
        kind: Kind::Expands,
        sql: include_str!("../migrations/0007_cleanups.sql"),
    },
    Change {
        version: 8,
        name: "versions",
        kind: Kind::Expands,
        sql: include_str!("../migrations/0008_versions.sql"),
    },
    Change {
        version: 9,
        name: "missing",
        kind: Kind::Expands,
        sql: include_str!("../migrations/0009_missing.sql"),
    },
];

fn newest() -> i64 {
    CHANGES.last().map_or(0, |change| change.version)
}

/// What is to become of a record's schema when a program opens it.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Plan {
    /// It is this build's, or a newer one that this build can work with.
    Use,
    /// It is older, and may be changed now.
    Change,
    /// It is older, and others are at work.
    Wait,
    /// It is newer, and this build cannot work with it.
    TooNew,
}

/// How a record stands.
#[derive(Debug, Clone, Copy)]
struct Standing {
    /// The newest change that was made to it.
    version: i64,
    /// The oldest program that can work with it, by the newest change it knows.
    minimum: i64,
}

impl Standing {
    /// What follows, for a program that is alone with the record or not, and was
    /// told to change it or not.
    fn plan(self, alone: bool, told: bool) -> Plan {
        let pending = CHANGES.iter().filter(|c| c.version > self.version);
        let contracts = pending.clone().any(|c| c.kind == Kind::Contracts);
        match (self.minimum > newest(), pending.count() > 0) {
            (true, _) => Plan::TooNew,
            (false, false) => Plan::Use,
            (false, true) if alone || (told && !contracts) => Plan::Change,
            (false, true) => Plan::Wait,
        }
    }
}

/// All of it, for a record that is new and that nobody else will open.
pub(crate) fn whole() -> impl Iterator<Item = &'static str> {
    CHANGES.iter().map(|change| change.sql)
}

/// How a record stands; an empty one is of version 0.
async fn standing(connection: &mut AnyConnection) -> Standing {
    // A table that is not there yet is an error of its own in each database.
    let number = async |connection: &mut AnyConnection, query: &'static str| {
        let row = sqlx::query(query).fetch_one(connection).await.ok()?;
        row.try_get::<Option<i64>, _>(0).ok().flatten()
    };
    let version = "SELECT MAX(version) FROM _sqlx_migrations";
    let minimum = "SELECT MAX(minimum) FROM compatibility";
    Standing {
        version: number(connection, version).await.unwrap_or(0),
        minimum: number(connection, minimum).await.unwrap_or(0),
    }
}

/// Brings the schema up to date.
fn changes() -> Migrator {
    let change = |c: &Change| {
        let sql = sqlx::SqlStr::from_static(c.sql);
        SchemaChange::new(c.version, c.name.into(), MigrationType::Simple, sql, false)
    };
    Migrator::with_migrations(CHANGES.iter().map(change).collect())
}

/// Holds the record as one of those that work with it, until the connection ends.
/// While somebody changes the schema it waits.
pub(crate) async fn hold(connection: &mut AnyConnection) -> Result<(), sqlx::Error> {
    let lock = "SELECT pg_advisory_lock_shared($1, hashtext(current_schema()))";
    let lock: sqlx::query::Query<'_, Any, _> = sqlx::query(lock);
    lock.bind(LOCK).execute(connection).await?;
    Ok(())
}

/// Whether nobody else works with the record; if so none can begin to until the
/// connection ends.
async fn is_alone(connection: &mut AnyConnection, standing: Standing) -> Result<bool, sqlx::Error> {
    let lock = "SELECT pg_try_advisory_lock($1, hashtext(current_schema()))";
    let row = sqlx::query(lock)
        .bind(LOCK)
        .fetch_one(&mut *connection)
        .await?;
    if !row.try_get::<bool, _>(0)? {
        return Ok(false);
    }
    // Conductors of builds before the lock are known by their leases alone.
    if !(1..LOCKS_SINCE).contains(&standing.version) {
        return Ok(true);
    }
    let leases = "SELECT COUNT(*) FROM migrations WHERE active = 1 AND status <> 'finished' \
                  AND lease_until_ms > EXTRACT(EPOCH FROM clock_timestamp()) * 1000";
    let row = sqlx::query(leases).fetch_one(connection).await?;
    Ok(row.try_get::<i64, _>(0)? == 0)
}

/// Ends the connections of those who worked with the record while it was changed: on
/// PostgreSQL a statement that was prepared before fails from then on, as its rows have
/// other columns, and their new connections prepare theirs anew.
async fn reconnect_others(connection: &mut AnyConnection) {
    let end = "SELECT pg_terminate_backend(pid) FROM pg_locks WHERE locktype = 'advisory' \
         AND database = (SELECT oid FROM pg_database WHERE datname = current_database()) \
         AND CAST(classid AS BIGINT) = $1 \
         AND CAST(objid AS BIGINT) = (CAST(hashtext(current_schema()) AS BIGINT) & 4294967295) \
         AND pid <> pg_backend_pid()";
    let end = sqlx::query(end).bind(i64::from(LOCK));
    if let Err(error) = end.execute(connection).await {
        warn!(%error, "the schema is changed: restart the conductors that were at work meanwhile");
    }
}

/// Why a record cannot be used as it is.
#[derive(Debug)]
pub(crate) enum Unusable {
    /// The database failed.
    Database(sqlx::Error),
    /// A change could not be made.
    Change(MigrateError),
    /// It is older, and others are at work.
    Others,
    /// It is newer than this build can work with.
    TooNew,
}

impl Unusable {
    /// What is wrong, and what to do about it.
    pub(crate) fn words(&self) -> (String, &'static str) {
        match self {
            Self::Database(error) => (error.to_string(), "see the database's own log"),
            Self::Change(error) => (error.to_string(), "see the database's own log"),
            Self::Others => (
                "it is of an older Drover, and other conductors work with it".to_owned(),
                "run 'drover-conductor migrate', or stop them all and start this one first",
            ),
            Self::TooNew => (
                "it is of a newer Drover, which has taken away what this one needs".to_owned(),
                "use the newer one",
            ),
        }
    }
}

impl From<sqlx::Error> for Unusable {
    fn from(error: sqlx::Error) -> Self {
        Self::Database(error)
    }
}

/// Looks again so often whether the others have gone, or have changed it themselves.
const LOOKS: u32 = 5;
const BETWEEN_LOOKS: Duration = Duration::from_millis(200);

/// Makes a record fit for this build, if that may be done now. Of a record that
/// `others` may use the connection is to be closed afterwards: it keeps them out.
pub(crate) async fn bring_up(
    connection: &mut AnyConnection,
    others: bool,
    told: bool,
) -> Result<(), Unusable> {
    for look in 0..LOOKS {
        if look > 0 {
            tokio::time::sleep(BETWEEN_LOOKS).await;
        }
        let standing = standing(connection).await;
        if standing.plan(false, false) == Plan::Use {
            return Ok(());
        }
        let alone = !others || is_alone(connection, standing).await?;
        match standing.plan(alone, told) {
            Plan::Use => return Ok(()),
            Plan::TooNew => return Err(Unusable::TooNew),
            Plan::Change => {
                let changed = changes().run_direct(None, &mut *connection, false).await;
                changed.map_err(Unusable::Change)?;
                if !alone {
                    reconnect_others(connection).await;
                }
                return Ok(());
            }
            Plan::Wait => {}
        }
    }
    Err(Unusable::Others)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_schema_is_changed_by_whoever_is_alone_or_told_to() {
        let of = |version, minimum| Standing { version, minimum };
        let (old, now, later) = (
            of(newest() - 1, 1),
            of(newest(), 1),
            of(newest() + 1, newest()),
        );
        for (alone, told, wanted) in [
            (true, false, Plan::Change),
            (false, true, Plan::Change),
            (false, false, Plan::Wait),
        ] {
            assert_eq!(old.plan(alone, told), wanted);
            assert_eq!(now.plan(alone, told), Plan::Use);
            assert_eq!(later.plan(alone, told), Plan::Use, "it only expanded");
            let contracted = of(newest() + 2, newest() + 1);
            assert_eq!(contracted.plan(alone, told), Plan::TooNew);
        }
    }
}
