//! Text from outside, made fit for a log line.

/// At most 200 characters, control characters escaped: no log line can be forged.
pub(crate) fn shown(text: &str) -> String {
    const LONGEST: usize = 200;
    let mut shown: String = text
        .chars()
        .take(LONGEST)
        .flat_map(|c| {
            let escape = c.is_control().then(|| c.escape_default());
            let plain = escape.is_none().then_some(c);
            escape.into_iter().flatten().chain(plain)
        })
        .collect();
    if text.chars().nth(LONGEST).is_some() {
        shown.push('…');
    }
    shown
}

#[cfg(test)]
mod tests {
    #[test]
    fn lines_cannot_be_forged_and_are_short() {
        assert_eq!(super::shown("a\nb\u{1b}ü"), "a\\nb\\u{1b}ü");
        assert_eq!(super::shown(&"x".repeat(500)).chars().count(), 201);
    }
}
