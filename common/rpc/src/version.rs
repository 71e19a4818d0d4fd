//! Which versions of an interface answer which requests.

use crate::failure::RemoteFailure;

/// Whether an interface that implements one version may answer a request for
/// another: same major; minor not newer; revision not newer if minors are equal.
///
/// # Errors
/// For a version that is no version, the very exception a Python peer answers.
pub(crate) fn is_compatible(implemented: &str, requested: &str) -> Result<bool, RemoteFailure> {
    let (imp_major, imp_minor, imp_revision) = split(implemented)?;
    let (req_major, req_minor, req_revision) = split(requested)?;
    Ok(imp_major == req_major
        && req_minor <= imp_minor
        && (req_minor != imp_minor || req_revision <= imp_revision))
}

fn split(version: &str) -> Result<(u64, u64, u64), RemoteFailure> {
    let mut parts = version.split('.');
    let major = number(parts.next().unwrap_or_default())?;
    let minor = match parts.next() {
        Some(text) => number(text)?,
        None => {
            return Err(RemoteFailure::builtin(
                "IndexError",
                "list index out of range",
            ));
        }
    };
    let revision = parts.next().map_or(Ok(0), number)?;
    Ok((major, minor, revision))
}

fn number(text: &str) -> Result<u64, RemoteFailure> {
    text.trim().parse().map_err(|_| {
        let shown: String = text.chars().take(40).flat_map(char::escape_debug).collect();
        RemoteFailure::value_error(format!("invalid literal for int() with base 10: '{shown}'"))
    })
}
