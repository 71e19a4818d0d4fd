//! The secret that lets a sender in.

use std::{
    fmt::{self, Write as _},
    str::FromStr,
};

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use uuid::Uuid;

/// Bytes of a token.
pub(crate) const TOKEN: usize = 32;

/// What a sender shows to be let in, made anew for each migration. Reads and
/// writes as 64 hexadecimal digits.
#[derive(Clone)]
pub struct Token([u8; TOKEN]);

/// The text is not a token.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("a token is {} hexadecimal digits", TOKEN * 2)]
pub struct NotAToken;

impl Token {
    /// A new one, from the system's source of randomness.
    #[must_use]
    pub fn generate() -> Self {
        let mut bytes = [0; TOKEN];
        for part in bytes.chunks_mut(8) {
            // A version 4 UUID is random but for six bits, which are in its
            // bytes 6 and 8: the last seven are all random, and so are the first six.
            let random = Uuid::new_v4().into_bytes();
            let random = [&random[9..], &random[..1]].concat();
            part.copy_from_slice(&random);
        }
        Self(bytes)
    }

    pub(crate) fn bytes(&self) -> &[u8; TOKEN] {
        &self.0
    }

    /// Whether these are its bytes, in a time that does not tell how many are.
    pub(crate) fn is(&self, shown: &[u8; TOKEN]) -> bool {
        let differing = self
            .0
            .iter()
            .zip(shown)
            .fold(0, |differing, (own, shown)| differing | (own ^ shown));
        std::hint::black_box(differing) == 0
    }
}

impl PartialEq for Token {
    fn eq(&self, other: &Self) -> bool {
        self.is(&other.0)
    }
}

impl Eq for Token {}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token(…)")
    }
}

impl fmt::Display for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut text = String::with_capacity(TOKEN * 2);
        for byte in self.0 {
            write!(text, "{byte:02x}")?;
        }
        f.write_str(&text)
    }
}

impl FromStr for Token {
    type Err = NotAToken;

    fn from_str(text: &str) -> Result<Self, NotAToken> {
        let digits = text.as_bytes();
        if digits.len() != TOKEN * 2 {
            return Err(NotAToken);
        }
        let digit = |byte: u8| char::from(byte).to_digit(16).ok_or(NotAToken);
        let mut bytes = [0; TOKEN];
        for (byte, pair) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
            let value = digit(pair[0])? * 16 + digit(pair[1])?;
            *byte = u8::try_from(value).map_err(|_| NotAToken)?;
        }
        Ok(Self(bytes))
    }
}

impl Serialize for Token {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Token {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_back_and_is_never_shown_by_accident() {
        let token = Token::generate();
        let text = token.to_string();
        assert_eq!(text.len(), 64);
        assert_eq!(text.parse(), Ok(token.clone()));
        assert_eq!(format!("{token:?}"), "Token(…)");
        let json = serde_json::to_string(&token).unwrap();
        assert_eq!(json, format!("\"{text}\""));
        assert_eq!(serde_json::from_str::<Token>(&json).unwrap(), token);
        assert_ne!(token, Token::generate());
    }

    #[test]
    fn anything_else_is_no_token() {
        for bad in ["", "12", &"g".repeat(64), &"+1".repeat(32), &"0".repeat(65)] {
            assert_eq!(bad.parse::<Token>(), Err(NotAToken), "{bad}");
        }
    }
}
