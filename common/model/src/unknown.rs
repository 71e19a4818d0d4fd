//! What a newer Drover wrote and this one does not know: kept as it came, so
//! that a row that goes through an older process loses nothing, and refused in
//! words by whoever would have to act on it.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

/// Fields of a wish that this version does not know. To be flattened into a type
/// whose unknown fields must not be passed over; what is empty is not sent.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(transparent)]
// Boxed: it stands in many types, and is empty in nearly all.
pub struct Unknown(Box<Map<String, Value>>);

impl Unknown {
    /// One line for each field, for whoever would have to act on it.
    pub fn problems(&self) -> Vec<String> {
        let version = env!("CARGO_PKG_VERSION");
        let line = |name: &String| {
            format!("'{name}' is not known to this Drover ({version}): leave it out, or upgrade")
        };
        self.0.keys().map(line).collect()
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use crate::migration::{LiveOptions, ProjectTransfer, Way};

    #[test]
    fn an_option_of_a_newer_version_is_kept_named_and_sent_on() {
        let newer = json!({"post_copy": true, "colour": "blue"});
        let options: LiveOptions = serde_json::from_value(newer).unwrap();
        assert!(options.post_copy);
        let problems = options.problems();
        assert_eq!(problems.len(), 1, "{problems:?}");
        assert!(problems[0].starts_with("'colour' is not known to this Drover"));
        let back = serde_json::to_value(&options).unwrap();
        assert_eq!(back["colour"], "blue");
    }

    #[test]
    fn what_is_known_leaves_no_trace_of_the_unknown() {
        let options = LiveOptions::default();
        assert!(options.problems().is_empty());
        let sent = serde_json::to_value(&options).unwrap();
        assert_eq!(
            serde_json::from_value::<LiveOptions>(sent).unwrap(),
            options
        );
    }

    #[test]
    fn it_is_found_below_another_flattened_type() {
        let newer = json!({"project": "beta", "mode": "cold", "colour": "blue"});
        let transfer: ProjectTransfer = serde_json::from_value(newer).unwrap();
        let problems = Way::Transfer(transfer).problems();
        assert_eq!(problems.len(), 1, "{problems:?}");
    }
}
