//! Drover's record. The only crate that names the database: SQLite by default,
//! PostgreSQL for several conductors, one SQL text for both.
//!
//! [`agents`] knows which run of each agent counts, [`hearing`] for how long it was
//! silent; [`nodes`] and [`instances`] keep what agents report; [`migrations`] what is
//! done and by whom; [`claims`] what is promised on a destination; [`projects`]
//! who may have how much; [`offers`] what is offered to other projects;
//! [`operations`] what is done with whole nodes; [`definitions`] what is kept for
//! the day on which one is dead; [`fencing`] power that was cut; [`sagas`] the
//! journals; [`outbox`] notifications on their way out; [`retention`] how long what
//! is over is kept. What belongs together is committed together.

pub mod agents;
pub mod claims;
mod database;
pub mod definitions;
pub mod fencing;
pub mod hearing;
mod here;
pub mod instances;
pub mod migrations;
pub mod nodes;
pub mod offers;
pub mod operations;
pub mod outbox;
pub mod projects;
pub mod retention;
pub mod sagas;
mod schema;
pub mod scratch;

use std::{str::FromStr, time::Duration};

use drover_model::{
    error::ErrorClass,
    ids::{MigrationId, OperationId},
};
use sqlx::{
    Any, AnyConnection, Connection, Row,
    any::{AnyPoolOptions, AnyRow, install_default_drivers},
};
use tokio::sync::{broadcast, watch};

use database::{Database, Tx};
use here::Here;
use migrations::Lease;

/// Result of a store call.
pub type Result<T> = std::result::Result<T, StoreError>;

/// What can go wrong with the record.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The database cannot be opened.
    #[error("cannot open the database {url}: {message}; {remedy}")]
    Open {
        /// Which, without its password.
        url: String,
        /// Why.
        message: String,
        /// What to do about it.
        remedy: &'static str,
    },
    /// The database failed.
    #[error("the database failed")]
    Database(#[source] sqlx::Error),
    /// The database gave this one up in favour of others that wanted the same rows;
    /// nothing was written.
    #[error("others were faster, again and again; try it once more")]
    Raced(#[source] sqlx::Error),
    /// A row holds what no Drover wrote.
    #[error("the record of {what} cannot be read: {message}")]
    Corrupt {
        /// Which row.
        what: String,
        /// What is wrong.
        message: String,
    },
    /// A row holds what a newer Drover wrote and this one does not understand. It is
    /// left as it is.
    #[error(
        "the record of {what} is of a newer Drover and cannot be read by this one: {message}; \
         upgrade this conductor, or leave that to a newer one"
    )]
    Newer {
        /// Which row.
        what: String,
        /// What is not understood.
        message: String,
    },
    /// There is no such thing.
    #[error("there is no {0}")]
    NotFound(String),
    /// A prefix or name fits several.
    #[error("{0}")]
    Ambiguous(String),
    /// Somebody else changed the row; the caller looks again.
    #[error("{0} was changed by somebody else at the same time")]
    Conflict(String),
    /// Another process goes on with it: this one must let go.
    #[error("another conductor goes on with {0}")]
    Fenced(String),
    /// The change is not one this record can make.
    #[error("{0}")]
    Illegal(String),
    /// It is there already.
    #[error("{0} exists already")]
    Exists(String),
    /// What was asked for cannot be; says why.
    #[error("{0}")]
    Invalid(String),
}

impl StoreError {
    /// Its class.
    pub fn class(&self) -> ErrorClass {
        match self {
            Self::Database(_) | Self::Raced(_) | Self::Conflict(_) => ErrorClass::Retryable,
            Self::Open { .. }
            | Self::Newer { .. }
            | Self::NotFound(_)
            | Self::Ambiguous(_)
            | Self::Exists(_)
            | Self::Invalid(_) => ErrorClass::Refused,
            Self::Corrupt { .. } | Self::Illegal(_) | Self::Fenced(_) => ErrorClass::Bug,
        }
    }
}

/// Codes of a database that lets one of several go first: PostgreSQL's for
/// serialization failures, deadlocks and locks that were not to be had, SQLite's
/// for a file that is busy or locked.
const RACES: [&str; 8] = ["40001", "40P01", "55P03", "5", "6", "261", "262", "517"];

impl From<sqlx::Error> for StoreError {
    fn from(error: sqlx::Error) -> Self {
        let Some(reported) = error.as_database_error() else {
            return Self::Database(error);
        };
        if reported.is_unique_violation() {
            let table = reported.table().unwrap_or("the record");
            return Self::Conflict(format!("a row of {table}"));
        }
        let raced = reported
            .code()
            .is_some_and(|code| RACES.contains(&code.as_ref()));
        match raced {
            true => Self::Raced(error),
            false => Self::Database(error),
        }
    }
}

/// Which database it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A file (or memory) of this process alone.
    Sqlite,
    /// A server, which several conductors may share.
    Postgresql,
}

impl Kind {
    /// Its name.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Sqlite => "sqlite",
            Self::Postgresql => "postgresql",
        }
    }
}

/// The record. Cheap to clone.
#[derive(Clone)]
pub struct Store {
    database: Database,
    kind: Kind,
    changes: broadcast::Sender<MigrationId>,
    operation_changes: broadcast::Sender<OperationId>,
    turns: watch::Sender<()>,
    hearing: hearing::Hearing,
    /// While this is true, the process that uses it stands still.
    still: Option<watch::Receiver<bool>>,
}

/// Changes that waiters may lag behind before they are told to look themselves.
const CHANGES_BUFFERED: usize = 1024;
/// Connections to PostgreSQL. SQLite has one: it is the lock of all writers.
const POSTGRES_CONNECTIONS: u32 = 8;

impl Store {
    /// Opens a database, makes it if it is a file that is not there, and brings
    /// its schema up to date if nobody else uses it. `sqlite:///path/to/file` or
    /// `postgresql://…`.
    ///
    /// # Errors
    /// [`StoreError::Open`] with what to do about it.
    pub async fn open(url: &str) -> Result<Self> {
        Self::connect(url, false).await
    }

    /// The same, bringing the schema up to date while others use it, as far as that
    /// does them no harm.
    ///
    /// # Errors
    /// [`StoreError::Open`] with what to do about it.
    pub async fn migrate(url: &str) -> Result<Self> {
        Self::connect(url, true).await
    }

    /// An empty record in memory, for simulation: each call is over before anybody
    /// else of this thread goes on, and tokio's paused clock stands still meanwhile.
    ///
    /// # Errors
    /// SQLite has no memory.
    pub async fn in_memory() -> Result<Self> {
        let here = Here::new(schema::whole())?;
        Ok(Self::of(Database::Here(here), Kind::Sqlite))
    }

    /// Another record, in that file, as this one is now, for simulation.
    ///
    /// # Errors
    /// It is no record in memory, or the file cannot be written.
    pub fn copied(&self, file: &str) -> Result<Self> {
        match &self.database {
            Database::Here(here) => Ok(Self::of(Database::Here(here.copied(file)?), Kind::Sqlite)),
            _ => Err(StoreError::Conflict(
                "a record that is not in memory".to_owned(),
            )),
        }
    }

    /// The same record as another process has it, for simulation: what changes
    /// through this one is not heard there. While `still` is true that process
    /// stands still, and its calls wait.
    pub fn of_another_process(&self, still: watch::Receiver<bool>) -> Self {
        Self {
            changes: broadcast::channel(CHANGES_BUFFERED).0,
            operation_changes: broadcast::channel(CHANGES_BUFFERED).0,
            turns: watch::Sender::new(()),
            still: Some(still),
            ..self.clone()
        }
    }

    async fn connect(url: &str, told: bool) -> Result<Self> {
        install_default_drivers();
        let shown = shown_url(url);
        let open = |message: String, remedy| StoreError::Open {
            url: shown.clone(),
            message,
            remedy,
        };
        let (kind, full) = match url.split_once(':') {
            Some(("sqlite", _)) if !url.contains('?') && !url.contains("memory") => {
                (Kind::Sqlite, format!("{url}?mode=rwc"))
            }
            Some(("sqlite", _)) => (Kind::Sqlite, url.to_owned()),
            Some(("postgres" | "postgresql", _)) => (Kind::Postgresql, url.to_owned()),
            _ => {
                return Err(open(
                    "unknown kind of database".to_owned(),
                    "use sqlite:///path/to/file or postgresql://user:password@host/name",
                ));
            }
        };
        let options = sqlx::any::AnyConnectOptions::from_str(&full)
            .map_err(|e| open(e.to_string(), "write it as a URL"))?;
        if kind == Kind::Postgresql {
            // A pool would hide the reason behind its own time limit.
            let probe = AnyConnection::connect_with(&options).await;
            let mut probe = probe.map_err(|e| open(e.to_string(), open_remedy(kind)))?;
            let ready = schema::bring_up(&mut probe, true, told).await;
            // It has served, whatever comes of its good-bye.
            let _ = probe.close().await;
            ready.map_err(|unusable| {
                let (message, remedy) = unusable.words();
                open(message, remedy)
            })?;
        }
        let pool = pool_options(kind)
            .connect_with(options)
            .await
            .map_err(|e| open(e.to_string(), open_remedy(kind)))?;
        if kind == Kind::Sqlite {
            let bring_up = async {
                let mut connection = pool.acquire().await?;
                schema::bring_up(&mut connection, false, told).await
            };
            bring_up.await.map_err(|unusable: schema::Unusable| {
                let (message, remedy) = unusable.words();
                open(message, remedy)
            })?;
        }
        Ok(Self::of(Database::Pool(pool), kind))
    }

    fn of(database: Database, kind: Kind) -> Self {
        let (changes, _) = broadcast::channel(CHANGES_BUFFERED);
        let (operation_changes, _) = broadcast::channel(CHANGES_BUFFERED);
        Self {
            database,
            kind,
            changes,
            operation_changes,
            turns: watch::Sender::new(()),
            hearing: hearing::Hearing::default(),
            still: None,
        }
    }

    /// The same record for a conductor that hears with its own ears.
    #[must_use]
    pub fn heard_apart(self) -> Self {
        Self {
            hearing: hearing::Hearing::default(),
            ..self
        }
    }

    /// Who was heard of, as whoever works with this hears.
    pub fn hearing(&self) -> &hearing::Hearing {
        &self.hearing
    }

    /// Does to the record what no Drover would. For tests.
    ///
    /// # Errors
    /// The database failed.
    pub async fn damage(&self, sql: &'static str) -> Result<()> {
        self.steady(sqlx::raw_sql(sql).execute(&self.database))
            .await?;
        Ok(())
    }

    /// Which database it is.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// Ids of migrations whose record changes through this process from now on.
    pub fn changes(&self) -> broadcast::Receiver<MigrationId> {
        self.changes.subscribe()
    }

    /// The same of operations.
    pub fn operation_changes(&self) -> broadcast::Receiver<OperationId> {
        self.operation_changes.subscribe()
    }

    /// Changes whenever a turn to send is given back through this process.
    pub fn turns(&self) -> watch::Receiver<()> {
        self.turns.subscribe()
    }

    pub(crate) fn turn_given_back(&self) {
        self.turns.send_replace(());
    }

    pub(crate) fn operation_changed(&self, id: OperationId) {
        let _ = self.operation_changes.send(id);
    }

    pub(crate) fn changed(&self, id: MigrationId) {
        // Nobody waiting is no error.
        let _ = self.changes.send(id);
    }

    async fn begin(&self) -> Result<Tx> {
        Ok(match self.kind {
            // A transaction that begins as a reader and writes later can fail half-way.
            Kind::Sqlite => self.database.begin("BEGIN IMMEDIATE").await?,
            Kind::Postgresql => self.database.begin("BEGIN").await?,
        })
    }

    /// The same for whoever drives a migration, by its newest lease alone.
    ///
    /// # Errors
    /// [`StoreError::Fenced`], or the database failed.
    async fn begin_under(&self, lease: Lease) -> Result<Tx> {
        let mut tx = self.begin().await?;
        migrations::fence(&mut tx, lease).await?;
        Ok(tx)
    }

    /// Begins to read in several statements what is to be of one moment.
    async fn begin_reading(&self) -> Result<Tx> {
        Ok(match self.kind {
            Kind::Sqlite => self.database.begin("BEGIN").await?,
            Kind::Postgresql => {
                let begin = "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY";
                self.database.begin(begin).await?
            }
        })
    }

    /// Does work on the database, as the process that asks for it can.
    async fn steady<T>(&self, work: impl Future<Output = T>) -> T {
        if let Some(still) = &self.still {
            // What froze it is gone: nobody will wake it.
            let woken = still.clone().wait_for(|still| !still).await.is_ok();
            if !woken {
                std::future::pending::<()>().await;
            }
        }
        work.await
    }

    /// Does work on the record, and does it again, from its first reading on, while
    /// others get in its way.
    async fn attempt<T, W>(&self, work: impl Fn() -> W) -> Result<T>
    where
        W: Future<Output = Result<T>>,
    {
        let mut tries = Tries::default();
        loop {
            match self.steady(work()).await {
                Ok(done) => return Ok(done),
                Err(error) => tries.again(error).await?,
            }
        }
    }

    /// One statement that writes; says how many rows.
    async fn execute<'q>(&self, statement: impl Fn() -> Statement<'q>) -> Result<u64> {
        let work = || async { Ok(statement().execute(&self.database).await?.rows_affected()) };
        self.attempt(work).await
    }

    /// One statement that writes and returns rows.
    async fn returned<'q>(&self, statement: impl Fn() -> Statement<'q>) -> Result<Vec<AnyRow>> {
        let work = || async { Ok(statement().fetch_all(&self.database).await?) };
        self.attempt(work).await
    }

    /// The time by which leases are held: that of the database's server, which is
    /// one for all conductors; of a file, that of its only one.
    async fn lease_clock_ms(&self, term: Term) -> Result<u64> {
        match self.kind {
            Kind::Sqlite => Ok(term.now_ms),
            Kind::Postgresql => {
                let now =
                    "SELECT CAST(EXTRACT(EPOCH FROM clock_timestamp()) * 1000 AS BIGINT) AS now_ms";
                let row = sqlx::query(now).fetch_one(&self.database).await?;
                Ok(unsigned(row.try_get("now_ms")?))
            }
        }
    }
}

type Statement<'q> = sqlx::query::Query<'q, Any, <Any as sqlx::Database>::Arguments>;

/// For how long something is held, from now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Term {
    /// Now by this process's clock, milliseconds since 1970. It counts only where no
    /// other process can hold anything.
    pub now_ms: u64,
    /// How long, ms.
    pub lease_ms: u64,
}

/// Tries at what others may get in the way of.
#[derive(Default)]
pub(crate) struct Tries(u32);

impl Tries {
    /// More would be a fault of ours, not a race.
    const MOST: u32 = 20;

    /// Waits until it may be tried again, or gives the error back.
    pub(crate) async fn again(&mut self, error: StoreError) -> Result<()> {
        let passes = matches!(error, StoreError::Conflict(_) | StoreError::Raced(_));
        self.0 += 1;
        if !passes || self.0 == Self::MOST {
            return Err(error);
        }
        // Not all at the same time: they would meet again.
        let most_ms = 1 << self.0.min(6);
        tokio::time::sleep(Duration::from_millis(fastrand::u64(0..most_ms))).await;
        Ok(())
    }
}

/// The next number of a kind.
pub(crate) async fn next_number(tx: &mut Tx, kind: Numbered) -> Result<i64> {
    // A conductor of an older build may have given out more.
    let row = sqlx::query(match kind {
        Numbered::Migrations => {
            "UPDATE counters SET last = 1 + CASE \
             WHEN last < (SELECT COALESCE(MAX(id), 0) FROM migrations) \
             THEN (SELECT COALESCE(MAX(id), 0) FROM migrations) ELSE last END \
             WHERE name = 'migrations' RETURNING last"
        }
        Numbered::Operations => {
            "UPDATE counters SET last = 1 + CASE \
             WHEN last < (SELECT COALESCE(MAX(id), 0) FROM operations) \
             THEN (SELECT COALESCE(MAX(id), 0) FROM operations) ELSE last END \
             WHERE name = 'operations' RETURNING last"
        }
    });
    Ok(row.fetch_one(&mut **tx).await?.try_get("last")?)
}

/// What has numbers.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Numbered {
    Migrations,
    Operations,
}

fn pool_options(kind: Kind) -> AnyPoolOptions {
    let options = AnyPoolOptions::new()
        .acquire_timeout(Duration::from_secs(30))
        .idle_timeout(None)
        .max_lifetime(None);
    match kind {
        Kind::Postgresql => options
            .max_connections(POSTGRES_CONNECTIONS)
            .after_connect(|connection, _| Box::pin(schema::hold(connection))),
        Kind::Sqlite => options
            .max_connections(1)
            .test_before_acquire(false)
            .after_connect(|connection, _| {
                Box::pin(async move {
                    // A journal that survives the machine's power (invariant 4).
                    const PRAGMAS: &str = "PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL; \
                         PRAGMA busy_timeout = 5000; PRAGMA cache_size = -256;";
                    sqlx::raw_sql(PRAGMAS).execute(connection).await?;
                    Ok(())
                })
            }),
    }
}

fn open_remedy(kind: Kind) -> &'static str {
    match kind {
        Kind::Sqlite => {
            "make its directory and let this user write there, or set [conductor] database_url"
        }
        Kind::Postgresql => "start the server, or mend [conductor] database_url",
    }
}

/// A URL fit for a log: without password.
fn shown_url(url: &str) -> String {
    let Some((scheme, rest)) = url.split_once("://") else {
        return url.to_owned();
    };
    match rest.rsplit_once('@') {
        Some((login, place)) => {
            let user = login.split(':').next().unwrap_or("");
            format!("{scheme}://{user}:***@{place}")
        }
        None => url.to_owned(),
    }
}

/// A number for a database column. Columns are signed; ours never get that big.
pub(crate) fn signed(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

/// A number from a database column.
pub(crate) fn unsigned(value: i64) -> u64 {
    u64::try_from(value).unwrap_or(0)
}

pub(crate) fn to_json<T: serde::Serialize>(what: &str, value: &T) -> Result<String> {
    serde_json::to_string(value).map_err(|e| corrupt(what, &e))
}

pub(crate) fn from_json<T: serde::de::DeserializeOwned>(what: &str, text: &str) -> Result<T> {
    serde_json::from_str(text).map_err(|e| match e.is_data() {
        true => newer(what, &e),
        false => corrupt(what, &e),
    })
}

/// A row that is well-formed, and says what this build does not know.
pub(crate) fn newer(what: &str, error: &dyn std::fmt::Display) -> StoreError {
    StoreError::Newer {
        what: what.to_owned(),
        message: error.to_string(),
    }
}

/// What can be read of many rows; the others do not stand in its way.
pub(crate) fn readable<T>(rows: &[AnyRow], read: impl Fn(&AnyRow) -> Result<T>) -> Vec<T> {
    let said = |row| {
        read(row).inspect_err(|error| match error {
            // Said once, by whoever leaves it alone.
            StoreError::Newer { .. } => tracing::debug!(%error, "left out"),
            error => tracing::error!(%error, "left out"),
        })
    };
    rows.iter().filter_map(|row| said(row).ok()).collect()
}

/// A record as it is kept, whether or not this build understands it, with its version.
pub(crate) fn as_kept(row: &AnyRow) -> Result<serde_json::Value> {
    let text: String = row.try_get("record")?;
    let mut record: serde_json::Value =
        serde_json::from_str(&text).map_err(|e| corrupt("a row", &e))?;
    record["version"] = unsigned(row.try_get("version")?).into();
    Ok(record)
}

/// A record by its number, for words about one that cannot be read.
pub(crate) fn named(kind: &str, row: &AnyRow) -> String {
    let id = as_kept(row).ok().and_then(|record| record["id"].as_i64());
    id.map_or_else(|| kind.to_owned(), |id| format!("{kind} {id}"))
}

pub(crate) fn corrupt(what: &str, error: &dyn std::fmt::Display) -> StoreError {
    StoreError::Corrupt {
        what: what.to_owned(),
        message: error.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::shown_url;

    #[test]
    fn a_password_is_never_shown() {
        let shown = shown_url("postgresql://drover:sec@ret@db/x");
        assert_eq!(shown, "postgresql://drover:***@db/x");
        assert_eq!(shown_url("sqlite:///a/b"), "sqlite:///a/b");
    }
}
