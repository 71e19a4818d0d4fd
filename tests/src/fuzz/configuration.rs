//! The configuration file.

use std::path::Path;

use drover_compute::config as compute;
use drover_conductor::config as conductor;
use drover_rpc::MessagingSettings;
use drover_runtime::{
    config::{ConfigError, Document},
    logging::LogSettings,
};

/// What a file says is what it says once written anew; what is wrong with it is said
/// in one line, with the line and the key.
pub fn configuration(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else {
        return;
    };
    let told = read(text);
    for error in told.iter().filter_map(|part| part.as_ref().err()) {
        check(text, error);
    }
    let Ok(table) = toml::from_str::<toml::Table>(text) else {
        assert!(told.iter().all(Result::is_err));
        return;
    };
    let anew = toml::to_string(&table).expect("what was read can be written");
    let words = |told: Vec<Result<String, ConfigError>>| -> Vec<Option<String>> {
        told.into_iter().map(Result::ok).collect()
    };
    assert_eq!(words(read(&anew)), words(told), "{anew}");
}

/// What each process reads in it.
fn read(text: &str) -> Vec<Result<String, ConfigError>> {
    let document = || Document::parse(Path::new("drover.toml"), text);
    let messaging = || {
        let document = document()?;
        let messaging: MessagingSettings = document.section("messaging")?;
        let sound = messaging.validate();
        sound.map_err(|e| document.bad_key("messaging", e.name(), e.reason()))?;
        Ok(format!("{messaging:?}"))
    };
    let log = || Ok(format!("{:?}", document()?.section::<LogSettings>("log")?));
    vec![
        messaging(),
        log(),
        document().and_then(|d| Ok(format!("{:?}", conductor::read(&d)?))),
        document().and_then(|d| Ok(format!("{:?}", compute::read(&d)?))),
    ]
}

fn check(text: &str, error: &ConfigError) {
    let said = error.to_string();
    assert!(said.starts_with("drover.toml: "), "{said}");
    assert!(!said.contains(char::is_control), "{said:?}");
    let lines = text.matches('\n').count() + 1;
    let line = match error {
        ConfigError::Read { .. } => panic!("nothing was to be read: {said}"),
        ConfigError::Syntax { line, .. } | ConfigError::UnknownSection { line, .. } => Some(*line),
        ConfigError::Key { line, section, .. } => {
            let there = toml::from_str::<toml::Table>(text);
            let there = there.is_ok_and(|table| table.contains_key(section));
            assert_eq!(line.is_some(), there, "{said}");
            *line
        }
    };
    if let Some(line) = line {
        assert!((1..=lines).contains(&line), "{said}");
        assert!(said.contains(&format!(": line {line}: ")), "{said}");
    }
}
