//! JSON output. Its shapes are the model's own (`common/model`), so what a
//! script reads here is what travels:
//!
//! | verb | shape |
//! |---|---|
//! | `node list`, `node show` | array of `Node`, `Node` |
//! | `node disable`, `node enable` | `Node` as it is afterwards, or as it is, for a dry run |
//! | `instance list`, `instance show` | array of `Instance`, `Instance` |
//! | `instance migrate` | `Migration` as last seen; `Plan` for a dry run |
//! | `instance confirm`, `instance revert` | `Migration` as last seen, with `--keep-changes` that of the way back; as it is, for a dry run |
//! | `instance transfer`, `transfer accept` | `Migration` as last seen; `Plan` for a dry run |
//! | `transfer offer` | `OfferMade`, the only place the key is in; `Instance`, for a dry run |
//! | `transfer list`, `transfer show` | array of `Offer`, `Offer` |
//! | `transfer withdraw` | `Offer` as it is afterwards, or as it is, for a dry run |
//! | `project list`, `project show` | array of `ProjectView`, `ProjectView` |
//! | `project create`, `project set` | `ProjectView` as it is afterwards, or as it would be, for a dry run |
//! | `migration list`, `migration show` | array of `Migration`, `Migration` |
//! | `migration watch` | one `Migration` a line, at each change |
//! | `migration abort`, `force-complete`, `resume` | `Migration` as last seen |
//! | `node drain`, `restore`, `evacuate`, `balance` | `OperationView` as last seen, `Operation` with `--no-wait`; for a dry run the answer as it travels: `{"answer": "plan", "plan", "failures", "evidence"}` |
//! | `node forget` | `Node` as it was |
//! | `node force-down` | `Node` as it is afterwards, or as it is, for a dry run |
//! | `node automation` | `Automation` as it is afterwards, or as it is, for a dry run |
//! | `operation list` | array of `Operation` |
//! | `operation show`, `operation cancel` | `OperationView`; of a cancel as last seen, or as it is, for a dry run |
//! | `operation watch` | one `OperationView` a line, at each change of it or of its migrations |
//! | `doctor` | [`Diagnosis`](crate::command::doctor::judge::Diagnosis) |
//! | any, on trouble | `{"error": {"exit", "code", "message", "remedy", "class", "checks"}}` |

use drover_model::check::CheckFailure;
use serde::Serialize;

use super::is_unsafe;
use crate::exit::{Exit, Trouble};

/// A value over several lines, for people and scripts alike.
pub fn pretty<T: Serialize>(value: &T) -> String {
    harmless(serde_json::to_string_pretty(value))
}

/// A value on one line, for streams.
pub fn line<T: Serialize>(value: &T) -> String {
    harmless(serde_json::to_string(value))
}

/// Trouble as one object on one line.
pub fn trouble(trouble: &Trouble) -> String {
    #[derive(Serialize)]
    struct Outer<'a> {
        error: Inner<'a>,
    }
    #[derive(Serialize)]
    struct Inner<'a> {
        exit: Exit,
        code: u8,
        message: &'a str,
        remedy: Option<&'a str>,
        class: Option<&'a str>,
        checks: &'a [CheckFailure],
    }
    line(&Outer {
        error: Inner {
            exit: trouble.exit,
            code: trouble.exit.code(),
            message: &trouble.message,
            remedy: trouble.remedy.as_deref(),
            class: trouble.class.as_deref(),
            checks: &trouble.checks,
        },
    })
}

/// Escapes what JSON may hold and a terminal should not: all of it stands
/// inside strings, where an escape means the same.
fn harmless(text: serde_json::Result<String>) -> String {
    let text = text.expect("the model has string keys and finite numbers only");
    if !text.contains(|c| c != '\n' && is_unsafe(c)) {
        return text;
    }
    text.chars().fold(String::new(), |mut out, c| {
        if c != '\n' && is_unsafe(c) {
            out.push_str(&format!("\\u{:04x}", u32::from(c)));
        } else {
            out.push(c);
        }
        out
    })
}

#[cfg(test)]
mod tests {
    use drover_model::check::{CheckCode, Side};

    use super::*;

    #[test]
    fn escapes_read_back_as_what_they_stand_for() {
        let nasty = "a\u{9b}2J\u{7f}\u{202e}\n\x1b".to_owned();
        let text = pretty(&nasty);
        assert_eq!(text, r#""a\u009b2J\u007f\u202e\n\u001b""#);
        assert_eq!(serde_json::from_str::<String>(&text).unwrap(), nasty);
    }

    #[test]
    fn trouble_is_one_object_with_everything_in_it() {
        let check = CheckFailure {
            code: CheckCode::Memory,
            side: Side::Destination,
            message: "128 MiB left".to_owned(),
            remedy: "free some".to_owned(),
        };
        let refused = Trouble::refused("no", vec![check]).remedy("look");
        assert_eq!(
            trouble(&refused),
            r#"{"error":{"exit":"refused","code":3,"message":"no","remedy":"look","class":null,"checks":[{"code":"memory","side":"destination","message":"128 MiB left","remedy":"free some"}]}}"#
        );
    }
}
