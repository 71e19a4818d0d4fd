//! Databases for tests: an empty one on a server that the tests' caller has, each
//! for one test alone.

use uuid::Uuid;

/// A server on which schemas may be made, as a `postgresql://` URL.
pub const POSTGRESQL: &str = "DROVER_TEST_POSTGRESQL_URL";
/// Set to `1`, it turns the absence of one into a failure.
const REQUIRED: &str = "DROVER_REQUIRE_REAL";

/// An empty schema of the server, or says that there is none.
///
/// # Panics
/// The server must be there and does not answer.
#[allow(clippy::expect_used, clippy::print_stdout)] // For tests alone.
pub async fn postgresql_url() -> Option<String> {
    let Ok(server) = std::env::var(POSTGRESQL) else {
        let required = std::env::var(REQUIRED).is_ok_and(|value| value == "1");
        assert!(
            !required,
            "{REQUIRED} is 1, and {POSTGRESQL} names no server"
        );
        println!("SKIPPED: {POSTGRESQL} names no server");
        return None;
    };
    sqlx::any::install_default_drivers();
    let admin = sqlx::AnyPool::connect(&server).await.expect("a server");
    // The server goes with the tests, and all its schemas with it.
    let schema = format!("test_{}", Uuid::new_v4().simple());
    let create = sqlx::AssertSqlSafe(format!("CREATE SCHEMA {schema}"));
    let created = sqlx::query(create).execute(&admin).await;
    created.expect("schemas may be made");
    admin.close().await;
    Some(format!("{server}?options=-csearch_path%3D{schema}"))
}
