//! The record's promises, in both databases. One program: each would link all of
//! sqlx once more.

#![allow(clippy::unwrap_used)] // all of it is test

#[macro_use]
mod common;
mod operations;
mod projects;
mod races;
mod record;
mod retention;
