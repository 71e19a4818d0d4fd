//! Lists of which this command may not understand every entry: a newer conductor's
//! are shown by what can be made out of them, and do not stand in the way of the rest.

use serde::{Deserialize, Deserializer, Serialize, de::DeserializeOwned};
use serde_json::Value;

/// A list as it came.
#[derive(Debug, Clone, Serialize)]
#[serde(transparent)]
pub struct Listed<T> {
    all: Vec<Value>,
    #[serde(skip)]
    known: Vec<T>,
    #[serde(skip)]
    newer: Vec<String>,
}

impl<T> Listed<T> {
    /// What is understood.
    pub fn known(&self) -> &[T] {
        &self.known
    }

    /// Only that.
    pub fn into_known(self) -> Vec<T> {
        self.known
    }

    /// One line on each of the rest.
    pub fn newer(&self) -> &[String] {
        &self.newer
    }

    /// A table of what is understood, and the rest below it.
    pub fn below(&self, table: String) -> String {
        let lines = self.newer.iter().map(|line| format!("\n{line}"));
        std::iter::once(table).chain(lines).collect()
    }
}

impl<'de, T: DeserializeOwned> Deserialize<'de> for Listed<T> {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        let all = Vec::<Value>::deserialize(from)?;
        let (mut known, mut newer) = (Vec::new(), Vec::new());
        for value in &all {
            match T::deserialize(value) {
                Ok(one) => known.push(one),
                Err(error) => newer.push(line(value, &error.to_string())),
            }
        }
        Ok(Self { all, known, newer })
    }
}

fn line(value: &Value, error: &str) -> String {
    /// Longest part of it that is shown, characters.
    const LONGEST: usize = 80;
    let short = |text: &str| -> String {
        let shown = text.chars().filter(|c| !c.is_control());
        shown.take(LONGEST).collect()
    };
    let part = |key: &str| match value.get(key) {
        Some(Value::String(text)) => short(text),
        Some(Value::Number(number)) => number.to_string(),
        _ => "?".to_owned(),
    };
    format!(
        "{} is '{}', and of a newer Drover than this command ({}): {}; upgrade it",
        part("id"),
        part("status"),
        env!("CARGO_PKG_VERSION"),
        short(error)
    )
}

#[cfg(test)]
mod tests {
    use drover_model::migration::Migration;
    use serde_json::json;

    use super::*;
    use crate::samples;

    #[test]
    fn what_is_of_a_newer_version_does_not_hide_the_rest() {
        let known = samples::migration();
        let mut newer = serde_json::to_value(&known).unwrap();
        newer["id"] = json!(99);
        newer["status"] = json!("hover\u{1b}ing");
        let list = json!([newer, known, 7]);
        let listed: Listed<Migration> = serde_json::from_value(list.clone()).unwrap();
        assert_eq!(listed.known(), [known]);
        let below = listed.below("table".to_owned());
        assert!(
            below.starts_with("table\n99 is 'hovering', and of a newer Drover than this"),
            "{below}"
        );
        assert_eq!(serde_json::to_value(&listed).unwrap(), list);
    }
}
