//! One TOML file for all of Drover; each process reads the sections it needs.
//! Strict: an unknown section or key is an error that names it, so a misspelt
//! setting is never silently ignored.

use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;
use toml::de::{DeTable, DeValue};

/// Where the file is sought when nobody says otherwise.
pub const DEFAULT_PATH: &str = "/etc/drover/drover.toml";
/// Sections there may be.
pub const SECTIONS: &[&str] = &["messaging", "conductor", "compute", "fence", "log"];

/// A file that cannot be used: one line that says what, where and what to do.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// Not there, or not readable.
    #[error(
        "cannot read the configuration file {path}: {source}; give another with --config FILE or DROVER_CONFIG"
    )]
    Read {
        /// Which file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// Not TOML.
    #[error("{path}: line {line}: not valid TOML: {message}")]
    Syntax {
        /// Which file.
        path: PathBuf,
        /// Where in it.
        line: usize,
        /// What the parser says.
        message: String,
    },
    /// A section nobody knows.
    #[error("{path}: line {line}: unknown section [{section}]; there are {}", SECTIONS.join(", "))]
    UnknownSection {
        /// Which file.
        path: PathBuf,
        /// Where in it.
        line: usize,
        /// Its name.
        section: String,
    },
    /// A key that is wrong, missing or unknown.
    #[error("{path}: {}[{section}] {key}: {message}", line.map_or(String::new(), |n| format!("line {n}: ")))]
    Key {
        /// Which file.
        path: PathBuf,
        /// Where in it; none if neither the key nor its section is there.
        line: Option<usize>,
        /// In which section.
        section: String,
        /// Path of the key; `.` for the section itself.
        key: String,
        /// What is wrong with it.
        message: String,
    },
}

/// A configuration file that has been read.
#[derive(Debug)]
pub struct Document {
    path: PathBuf,
    text: String,
    table: toml::Table,
}

impl Document {
    /// Reads a file.
    ///
    /// # Errors
    /// It is not there, is no TOML, or has a section that nobody knows.
    pub fn read(path: &Path) -> Result<Self, ConfigError> {
        let text = std::fs::read_to_string(path).map_err(|source| ConfigError::Read {
            path: path.to_owned(),
            source,
        })?;
        Self::parse(path, &text)
    }

    /// Takes a text as the content of a file of that name.
    ///
    /// # Errors
    /// As [`Document::read`].
    pub fn parse(path: &Path, text: &str) -> Result<Self, ConfigError> {
        let table: toml::Table = toml::from_str(text).map_err(|e| ConfigError::Syntax {
            path: path.to_owned(),
            line: line_at(text, e.span().map_or(0, |span| span.start)),
            message: one_line(e.message()),
        })?;
        if let Some(section) = table.keys().find(|k| !SECTIONS.contains(&k.as_str())) {
            return Err(ConfigError::UnknownSection {
                path: path.to_owned(),
                line: line_of(text, section, "").unwrap_or(1),
                section: one_line(section),
            });
        }
        Ok(Self {
            path: path.to_owned(),
            text: text.to_owned(),
            table,
        })
    }

    /// Reads a section; one that is missing is read as empty.
    ///
    /// # Errors
    /// A key is wrong, missing or unknown; the error names it.
    pub fn section<T: DeserializeOwned>(&self, name: &str) -> Result<T, ConfigError> {
        let value = self.table.get(name).cloned();
        let value = value.unwrap_or_else(|| toml::Value::Table(toml::Table::new()));
        serde_path_to_error::deserialize(value).map_err(|e| {
            let key = e.path().to_string();
            self.bad_key(name, &key, e.into_inner().message())
        })
    }

    /// An error about a key of this file, for checks that go beyond types.
    pub fn bad_key(&self, section: &str, key: &str, message: &str) -> ConfigError {
        ConfigError::Key {
            path: self.path.clone(),
            line: line_of(&self.text, section, key),
            section: section.to_owned(),
            key: one_line(key),
            message: one_line(message),
        }
    }
}

/// Without line ends and other characters that would not be seen.
fn one_line(text: &str) -> String {
    let plain = text.replace(char::is_control, " ");
    plain.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// The line of a byte.
fn line_at(text: &str, at: usize) -> usize {
    let before = text.as_bytes().get(..at).unwrap_or_default();
    before.iter().filter(|byte| **byte == b'\n').count() + 1
}

/// The line of a key, or of as much of its path as is there.
fn line_of(text: &str, section: &str, key: &str) -> Option<usize> {
    let document = DeTable::parse(text).ok()?.into_inner();
    let (name, mut value) = document.get_key_value(section)?;
    let (mut at, mut rest) = (name.span().start, key);
    while let DeValue::Table(table) = value.get_ref() {
        // A name may hold dots: the longest that fits is meant.
        let fits = |name: &str| {
            let after = rest.strip_prefix(name)?;
            (after.is_empty() || after.starts_with(['.', '['])).then_some(after)
        };
        let found = table.iter().filter_map(|(name, value)| {
            let after = fits(name.get_ref())?;
            Some((name.span().start, after, value))
        });
        let Some((start, after, inner)) = found.min_by_key(|(_, after, _)| after.len()) else {
            break;
        };
        (at, rest, value) = (start, after.trim_start_matches('.'), inner);
    }
    Some(line_at(text, at))
}

#[cfg(test)]
mod tests {
    use serde::Deserialize;

    use super::*;

    #[derive(Debug, Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Compute {
        #[serde(default)]
        report_interval_s: u64,
    }

    fn error_of(text: &str) -> String {
        let path = Path::new("drover.toml");
        let read = Document::parse(path, text).and_then(|d| d.section::<Compute>("compute"));
        read.expect_err("must fail").to_string()
    }

    #[test]
    fn errors_are_one_line_that_says_where() {
        let cases = [
            (
                "[compute]\nreport_interval_s = 'x'\n",
                "[compute] report_interval_s: invalid type",
            ),
            ("[compute]\nreport_intervall_s = 1\n", "report_intervall_s"),
            ("[compute]\nreport_interval_s = \n", "line 2"),
            ("\n[computer]\n", "line 2: unknown section [computer]"),
            (
                "\n[compute]\n\nreport_interval_s = 'x'\n",
                "line 4: [compute] report_interval_s",
            ),
            ("[log]\n[compute]\nreport_intervall_s = 1\n", "line 3: "),
            ("compute.report_interval_s = -1", "line 1: "),
        ];
        for (text, expected) in cases {
            let error = error_of(text);
            assert!(error.contains(expected), "{error}");
            assert!(
                !error.contains('\n') && error.starts_with("drover.toml: "),
                "{error}"
            );
        }
    }

    #[test]
    fn a_missing_section_is_an_empty_one() {
        let document = Document::parse(Path::new("x"), "").unwrap();
        assert_eq!(
            document
                .section::<Compute>("compute")
                .unwrap()
                .report_interval_s,
            0
        );
    }

    #[test]
    fn a_missing_file_says_what_to_do() {
        let error = Document::read(Path::new("/nonexistent/x.toml"))
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("/nonexistent/x.toml") && error.contains("--config"),
            "{error}"
        );
    }
}
