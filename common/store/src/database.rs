//! Where statements go: to a pool of connections, or, in a simulation, to a database
//! of this thread ([`here`](crate::here)).

use std::{
    future,
    ops::{Deref, DerefMut},
};

use futures_util::{
    StreamExt,
    future::{BoxFuture, FutureExt},
    stream::{self, BoxStream},
};
use sqlx::{
    Any, AnyPool, Either, Error, Execute, Executor, SqlStr, Transaction,
    any::{AnyArguments, AnyQueryResult, AnyRow, AnyStatement, AnyTypeInfo},
};

use crate::here::{Begun, Here};

/// A database. Cheap to clone.
#[derive(Clone, Debug)]
pub(crate) enum Database {
    Pool(AnyPool),
    Here(Here),
}

impl Database {
    /// Begins a transaction with that statement.
    pub(crate) async fn begin(&self, sql: &'static str) -> Result<Tx, Error> {
        Ok(Tx(match self {
            Self::Pool(pool) => Open::Pooled(begin(pool, sql).await?),
            Self::Here(here) => Open::Here(here.begin(sql)?),
        }))
    }
}

/// SQLite itself undoes a transaction for which its disk is full, or fails: then the
/// connection takes it for open, undoes it in vain, and begins no other for ever. Such
/// a connection gives way to a new one.
async fn begin(pool: &AnyPool, sql: &'static str) -> Result<Transaction<'static, Any>, Error> {
    match pool.begin_with(sql).await {
        Err(Error::InvalidSavePointStatement) => {}
        begun => return begun,
    }
    // Of the one that there is: only SQLite's can be in that state.
    pool.acquire().await?.close().await?;
    pool.begin_with(sql).await
}

/// A transaction. Dropped, it is undone.
#[derive(Debug)]
pub(crate) struct Tx(Open);

/// What it is of; statements go there.
#[derive(Debug)]
pub(crate) enum Open {
    Pooled(Transaction<'static, Any>),
    Here(Begun),
}

impl Tx {
    /// It holds.
    pub(crate) async fn commit(self) -> Result<(), Error> {
        match self.0 {
            Open::Pooled(tx) => tx.commit().await,
            Open::Here(begun) => begun.commit(),
        }
    }
}

impl Deref for Tx {
    type Target = Open;

    fn deref(&self) -> &Open {
        &self.0
    }
}

impl DerefMut for Tx {
    fn deref_mut(&mut self) -> &mut Open {
        &mut self.0
    }
}

type Step = Result<Either<AnyQueryResult, AnyRow>, Error>;

/// A statement and its arguments.
fn taken<'q>(mut query: impl Execute<'q, Any>) -> Result<(SqlStr, Option<AnyArguments>), Error> {
    let arguments = query.take_arguments().map_err(Error::Encode)?;
    Ok((query.sql(), arguments))
}

fn all<'e, 'q>(here: &Here, query: impl Execute<'q, Any>) -> BoxStream<'e, Step> {
    let answer = taken(query).and_then(|(sql, arguments)| here.run(sql.as_str(), arguments));
    match answer {
        Ok(answer) => {
            let rows = answer.rows.into_iter().map(|row| Ok(Either::Right(row)));
            let steps = rows.chain([Ok(Either::Left(answer.result))]);
            stream::iter(steps.collect::<Vec<_>>()).boxed()
        }
        Err(error) => stream::once(future::ready(Err(error))).boxed(),
    }
}

fn first<'e, 'q>(
    here: &Here,
    query: impl Execute<'q, Any>,
) -> BoxFuture<'e, Result<Option<AnyRow>, Error>> {
    let answer = taken(query).and_then(|(sql, arguments)| here.run(sql.as_str(), arguments));
    future::ready(answer.map(|answer| answer.rows.into_iter().next())).boxed()
}

fn unprepared<'e>() -> BoxFuture<'e, Result<AnyStatement, Error>> {
    let words = "statements are prepared as they are run".to_owned();
    future::ready(Err(Error::Protocol(words))).boxed()
}

impl<'c> Executor<'c> for &'c mut Open {
    type Database = Any;

    fn fetch_many<'e, 'q: 'e, E>(self, query: E) -> BoxStream<'e, Step>
    where
        'c: 'e,
        E: 'q + Execute<'q, Any>,
    {
        match self {
            Open::Pooled(tx) => (&mut **tx).fetch_many(query),
            Open::Here(begun) => all(begun.database(), query),
        }
    }

    fn fetch_optional<'e, 'q: 'e, E>(self, query: E) -> BoxFuture<'e, Result<Option<AnyRow>, Error>>
    where
        'c: 'e,
        E: 'q + Execute<'q, Any>,
    {
        match self {
            Open::Pooled(tx) => (&mut **tx).fetch_optional(query),
            Open::Here(begun) => first(begun.database(), query),
        }
    }

    fn prepare_with<'e>(
        self,
        sql: SqlStr,
        parameters: &'e [AnyTypeInfo],
    ) -> BoxFuture<'e, Result<AnyStatement, Error>>
    where
        'c: 'e,
    {
        match self {
            Open::Pooled(tx) => (&mut **tx).prepare_with(sql, parameters),
            Open::Here(_) => unprepared(),
        }
    }
}

impl<'c> Executor<'c> for &'c Database {
    type Database = Any;

    fn fetch_many<'e, 'q: 'e, E>(self, query: E) -> BoxStream<'e, Step>
    where
        'c: 'e,
        E: 'q + Execute<'q, Any>,
    {
        match self {
            Database::Pool(pool) => pool.fetch_many(query),
            Database::Here(here) => all(here, query),
        }
    }

    fn fetch_optional<'e, 'q: 'e, E>(self, query: E) -> BoxFuture<'e, Result<Option<AnyRow>, Error>>
    where
        'c: 'e,
        E: 'q + Execute<'q, Any>,
    {
        match self {
            Database::Pool(pool) => pool.fetch_optional(query),
            Database::Here(here) => first(here, query),
        }
    }

    fn prepare_with<'e>(
        self,
        sql: SqlStr,
        parameters: &'e [AnyTypeInfo],
    ) -> BoxFuture<'e, Result<AnyStatement, Error>>
    where
        'c: 'e,
    {
        match self {
            Database::Pool(pool) => pool.prepare_with(sql, parameters),
            Database::Here(_) => unprepared(),
        }
    }
}

#[cfg(test)]
mod tests {
    use sqlx::{any::AnyPoolOptions, query, raw_sql};

    use super::*;

    #[tokio::test]
    async fn a_transaction_that_sqlite_undid_itself_is_not_the_last() {
        sqlx::any::install_default_drivers();
        let place = tempfile::tempdir().unwrap();
        let url = format!("sqlite://{}/record?mode=rwc", place.path().display());
        let options = AnyPoolOptions::new()
            .max_connections(1)
            .test_before_acquire(false);
        let database = Database::Pool(options.connect(&url).await.unwrap());
        let full = "CREATE TABLE t (x BLOB); PRAGMA max_page_count = 3";
        raw_sql(full).execute(&database).await.unwrap();
        let mut tx = database.begin("BEGIN IMMEDIATE").await.unwrap();
        let large = query("INSERT INTO t VALUES (zeroblob(1000000))");
        let refused = large.execute(&mut *tx).await.unwrap_err();
        assert!(refused.to_string().contains("full"), "{refused}");
        drop(tx);
        for _ in 0..2 {
            let mut tx = database.begin("BEGIN IMMEDIATE").await.unwrap();
            let small = query("INSERT INTO t VALUES (1)");
            small.execute(&mut *tx).await.unwrap();
            tx.commit().await.unwrap();
        }
    }
}
