//! Carries files by hand, for measuring.
//!
//! ```text
//! carry receive PORT UUID TOKENHEX FILE…
//! carry send ADDRESS PORT UUID TOKENHEX FILE…
//! ```
//!
//! `CARRY_RESUME=1` asks before sending; `CARRY_LIMIT` limits, bytes a second.

use std::{env, error::Error, time::Duration};

use drover_carrier::{Control, Incoming, Mode, Outgoing, Receiver, SendSpec, send};

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match arguments.as_slice() {
        ["receive", port, migration, token, files @ ..] => {
            let receiver = Receiver::listen(([0, 0, 0, 0], port.parse()?).into())?;
            let files = files.iter().map(|path| Incoming {
                path: path.into(),
                mode: Mode::Fresh,
            });
            receiver.expect(migration.parse()?, &token.parse()?, files.collect())?;
            loop {
                std::thread::park();
            }
        }
        ["send", address, port, migration, token, files @ ..] => {
            let spec = SendSpec {
                address: (*address).to_owned(),
                port: port.parse()?,
                migration: migration.parse()?,
                token: token.parse()?,
                files: files
                    .iter()
                    .map(|path| Outgoing { path: path.into() })
                    .collect(),
                resume: env::var_os("CARRY_RESUME").is_some(),
                progress_timeout: Duration::from_secs(30),
            };
            let control = Control::new();
            let limit = env::var("CARRY_LIMIT").ok();
            control.set_limit(limit.map(|limit| limit.parse()).transpose()?);
            println!("{:?}", send(&spec, &control)?);
            Ok(())
        }
        _ => Err("see the head of this example for how it is used".into()),
    }
}
