//! For simulation: an SQLite in memory that works in the thread that asks. Whoever
//! asks it has the whole answer before anybody else of that thread goes on, so
//! virtual time stands still meanwhile, and the same run can be had again. It speaks
//! to the rest of this crate as a connection of `sqlx` does.

use std::{
    borrow::Cow,
    error::Error as StdError,
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use rusqlite::{Connection, ErrorCode, config::DbConfig, types::Value};
use sqlx::{
    any::{AnyArguments, AnyQueryResult, AnyRow, AnyTypeInfo, AnyTypeInfoKind, AnyValue},
    error::{DatabaseError, ErrorKind},
};
use sqlx_core::any::{AnyColumn, AnyValueKind};

/// Statements that are kept prepared.
const PREPARED: usize = 256;
/// What `sqlx` has every connection do, and nothing that is for disks.
const PRAGMAS: &str =
    "PRAGMA foreign_keys = ON; PRAGMA journal_mode = MEMORY; PRAGMA synchronous = OFF;";

/// What a statement came to.
#[derive(Default)]
pub(crate) struct Answer {
    pub(crate) rows: Vec<AnyRow>,
    pub(crate) result: AnyQueryResult,
}

/// A database. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Here(Arc<Mutex<Connection>>);

impl fmt::Debug for Here {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Here")
    }
}

impl Here {
    /// An empty one, with that schema.
    pub(crate) fn new(schema: impl Iterator<Item = &'static str>) -> Result<Self, sqlx::Error> {
        let connection = Connection::open_in_memory().map_err(told)?;
        connection.set_prepared_statement_cache_capacity(PREPARED);
        // Else statements are planned anew for other arguments.
        let planned_once = connection.set_db_config(DbConfig::SQLITE_DBCONFIG_ENABLE_QPSG, true);
        planned_once.map_err(told)?;
        for sql in std::iter::once(PRAGMAS).chain(schema) {
            connection.execute_batch(sql).map_err(told)?;
        }
        Ok(Self(Arc::new(Mutex::new(connection))))
    }

    /// Another one in that file, as this one is now.
    pub(crate) fn copied(&self, file: &str) -> Result<Self, sqlx::Error> {
        self.lock()
            .execute("VACUUM INTO ?1", [file])
            .map_err(told)?;
        let connection = Connection::open(file).map_err(told)?;
        connection.execute_batch(PRAGMAS).map_err(told)?;
        Ok(Self(Arc::new(Mutex::new(connection))))
    }

    fn lock(&self) -> MutexGuard<'_, Connection> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Begins a transaction.
    pub(crate) fn begin(&self, sql: &'static str) -> Result<Begun, sqlx::Error> {
        self.run(sql, None)?;
        Ok(Begun {
            of: self.clone(),
            is_open: true,
        })
    }

    /// Does what a statement says; without arguments it may be several.
    pub(crate) fn run(
        &self,
        sql: &str,
        arguments: Option<AnyArguments>,
    ) -> Result<Answer, sqlx::Error> {
        let connection = self.lock();
        match arguments {
            Some(arguments) => answer(&connection, sql, arguments),
            None => connection.execute_batch(sql).map(|()| Answer::default()),
        }
        .map_err(told)
    }
}

fn answer(connection: &Connection, sql: &str, arguments: AnyArguments) -> rusqlite::Result<Answer> {
    let mut statement = connection.prepare_cached(sql)?;
    for index in 1..=statement.parameter_count() {
        // `$3` is the third argument, wherever it stands.
        let name = statement.parameter_name(index);
        let number = name.and_then(|name| name.get(1..)?.parse().ok());
        let number: usize = number.unwrap_or(index);
        let value = arguments.values.0.get(number.wrapping_sub(1));
        statement.raw_bind_parameter(index, value.map_or(Value::Null, bound))?;
    }
    let columns = statement.column_names().into_iter().enumerate();
    let columns = columns.map(|(ordinal, name)| AnyColumn {
        ordinal,
        name: name.to_owned().into(),
        // Each value says it for itself.
        type_info: AnyTypeInfo {
            kind: AnyTypeInfoKind::Null,
        },
    });
    let columns: Vec<AnyColumn> = columns.collect();
    let names = columns.iter().map(|c| (c.name.clone(), c.ordinal));
    let names = Arc::new(names.collect());
    let mut found = statement.raw_query();
    let mut rows = Vec::new();
    while let Some(row) = found.next()? {
        let values = (0..columns.len()).map(|at| {
            Ok(AnyValue {
                kind: kept(row.get(at)?),
            })
        });
        rows.push(AnyRow {
            column_names: Arc::clone(&names),
            columns: columns.clone(),
            values: values.collect::<rusqlite::Result<_>>()?,
        });
    }
    drop(found);
    let result = AnyQueryResult {
        rows_affected: connection.changes(),
        last_insert_id: None,
    };
    Ok(Answer { rows, result })
}

fn bound(value: &AnyValueKind) -> Value {
    match value {
        AnyValueKind::Bool(yes) => Value::Integer(i64::from(*yes)),
        AnyValueKind::SmallInt(number) => Value::Integer(i64::from(*number)),
        AnyValueKind::Integer(number) => Value::Integer(i64::from(*number)),
        AnyValueKind::BigInt(number) => Value::Integer(*number),
        AnyValueKind::Real(number) => Value::Real(f64::from(*number)),
        AnyValueKind::Double(number) => Value::Real(*number),
        AnyValueKind::Text(text) => Value::Text(text.to_string()),
        AnyValueKind::TextSlice(text) => Value::Text(text.to_string()),
        AnyValueKind::Blob(bytes) => Value::Blob(bytes.to_vec()),
        _ => Value::Null,
    }
}

fn kept(value: Value) -> AnyValueKind {
    match value {
        Value::Null => AnyValueKind::Null(AnyTypeInfoKind::Null),
        Value::Integer(number) => AnyValueKind::BigInt(number),
        Value::Real(number) => AnyValueKind::Double(number),
        Value::Text(text) => AnyValueKind::Text(Arc::new(text)),
        Value::Blob(bytes) => AnyValueKind::Blob(Arc::new(bytes)),
    }
}

/// A transaction. Dropped, it is undone.
pub(crate) struct Begun {
    of: Here,
    is_open: bool,
}

impl fmt::Debug for Begun {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Begun")
    }
}

impl Begun {
    /// Its database.
    pub(crate) fn database(&self) -> &Here {
        &self.of
    }

    /// It holds.
    pub(crate) fn commit(mut self) -> Result<(), sqlx::Error> {
        self.of.run("COMMIT", None)?;
        self.is_open = false;
        Ok(())
    }
}

impl Drop for Begun {
    fn drop(&mut self) {
        if self.is_open {
            // One that failed has undone itself.
            drop(self.of.run("ROLLBACK", None));
        }
    }
}

/// What SQLite refused.
#[derive(Debug)]
struct Refused {
    message: String,
    extended_code: i32,
    is_constraint: bool,
}

/// Extended codes of SQLite for rows that are there already.
const UNIQUE: [i32; 2] = [2067, 1555];

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "(code: {}) {}", self.extended_code, self.message)
    }
}

impl StdError for Refused {}

impl DatabaseError for Refused {
    fn message(&self) -> &str {
        &self.message
    }

    fn code(&self) -> Option<Cow<'_, str>> {
        Some(self.extended_code.to_string().into())
    }

    fn as_error(&self) -> &(dyn StdError + Send + Sync + 'static) {
        self
    }

    fn as_error_mut(&mut self) -> &mut (dyn StdError + Send + Sync + 'static) {
        self
    }

    fn into_error(self: Box<Self>) -> Box<dyn StdError + Send + Sync + 'static> {
        self
    }

    fn kind(&self) -> ErrorKind {
        match self.is_constraint && UNIQUE.contains(&self.extended_code) {
            true => ErrorKind::UniqueViolation,
            false => ErrorKind::Other,
        }
    }
}

fn told(error: rusqlite::Error) -> sqlx::Error {
    match error {
        rusqlite::Error::SqliteFailure(failure, message) => {
            let refused = Refused {
                message: message.unwrap_or_else(|| failure.to_string()),
                extended_code: failure.extended_code,
                is_constraint: failure.code == ErrorCode::ConstraintViolation,
            };
            sqlx::Error::Database(Box::new(refused))
        }
        other => sqlx::Error::Protocol(other.to_string()),
    }
}
