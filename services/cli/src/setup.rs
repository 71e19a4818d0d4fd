//! From options, environment and file to the broker's settings.

use std::path::Path;

use drover_rpc::{BrokerUrl, MessagingSettings};
use drover_runtime::config::{ConfigError, DEFAULT_PATH, Document};

use crate::{args::Global, exit::Trouble};

/// Settings, and in words where they came from.
#[derive(Debug)]
pub struct Source {
    /// The `[messaging]` section, with what was given before it.
    pub messaging: MessagingSettings,
    /// Which file, and what came before it.
    pub words: String,
}

/// Reads the settings. A file that was named must be there; the default one may
/// be missing where a URL is given, for a quick start.
///
/// # Errors
/// The file cannot be used, or the settings cannot work.
pub fn read(global: &Global) -> Result<Source, Trouble> {
    read_from(global, Path::new(DEFAULT_PATH))
}

fn read_from(global: &Global, default: &Path) -> Result<Source, Trouble> {
    let path = global.config.as_deref().unwrap_or(default);
    let may_be_missing = global.config.is_none() && global.url.is_some();
    let (mut messaging, mut words) = match file(path) {
        Ok(messaging) => (messaging, path.display().to_string()),
        Err(ConfigError::Read { source, .. })
            if may_be_missing && source.kind() == std::io::ErrorKind::NotFound =>
        {
            (MessagingSettings::default(), "no file".to_owned())
        }
        Err(error) => return Err(Trouble::usage(error.to_string())),
    };
    if let Some(url) = &global.url {
        messaging.url = BrokerUrl::from(url.as_str());
        words.push_str("; broker from --url or DROVER_URL");
    }
    let checked = messaging.validate();
    checked.map_err(|error| Trouble::usage(format!("{words}: {error}")))?;
    Ok(Source { messaging, words })
}

fn file(path: &Path) -> Result<MessagingSettings, ConfigError> {
    Document::read(path)?.section("messaging")
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;
    use crate::exit::Exit;

    const NOWHERE: &str = "/nonexistent/drover.toml";

    fn global(config: Option<PathBuf>, url: Option<&str>) -> Global {
        Global {
            config,
            url: url.map(str::to_owned),
            json: false,
        }
    }

    fn read(config: Option<PathBuf>, url: Option<&str>) -> Result<Source, Trouble> {
        read_from(&global(config, url), Path::new(NOWHERE))
    }

    #[test]
    fn a_url_comes_before_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("drover.toml");
        let text = "[messaging]\nurl = 'rabbit://a:b@filehost/'\ncontrol_exchange = 'nova'\n";
        std::fs::write(&path, text).unwrap();
        let from_file = read(Some(path.clone()), None).unwrap();
        assert!(
            from_file
                .messaging
                .url
                .to_string()
                .starts_with("filehost:5672")
        );
        let both = read(Some(path), Some("amqp://u:p@other/v")).unwrap();
        assert!(both.messaging.url.to_string().starts_with("other:5672"));
        assert_eq!(both.messaging.control_exchange, "nova");
    }

    #[test]
    fn a_url_alone_is_enough_for_a_start() {
        let source = read(None, Some("amqp://u:p@other/v")).unwrap();
        assert!(source.words.starts_with("no file"));
        let missing = read(Some(NOWHERE.into()), Some("amqp://h/")).unwrap_err();
        assert_eq!(missing.exit, Exit::Usage);
        assert!(missing.message.contains(NOWHERE), "{}", missing.message);
        assert!(read(None, None).unwrap_err().message.contains("--config"));
    }

    #[test]
    fn no_message_shows_the_password() {
        for url in ["amqp://u:secret@h:port/", "secret", "amqps://u:secret@h/"] {
            let trouble = read(None, Some(url)).unwrap_err();
            assert_eq!(trouble.exit, Exit::Usage);
            assert!(!trouble.message.contains("secret"), "{}", trouble.message);
        }
    }
}
