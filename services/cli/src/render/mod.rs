//! How values look: as tables, as progress, as JSON. Pure functions from value
//! to text, but for [`screen`], which owns the streams.

pub mod describe;
pub mod frame;
pub mod json;
pub mod meter;
pub mod offer;
pub mod operation;
pub mod outcome;
pub mod progress;
pub mod project;
pub mod screen;
pub mod table;
pub mod units;

/// A text from outside, fit for a terminal: no control characters (escape
/// sequences begin with one) and no marks that turn the reading direction.
/// Line breaks and tabs become blanks.
pub fn clean(text: &str) -> String {
    let shown = |c: char| match c {
        '\n' | '\r' | '\t' => Some(' '),
        c if is_unsafe(c) => None,
        c => Some(c),
    };
    text.chars().filter_map(shown).collect()
}

/// Whether a character can do more to a terminal than stand there.
pub(crate) fn is_unsafe(c: char) -> bool {
    c.is_control()
        || matches!(c, '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{feff}')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_from_outside_steers_the_terminal() {
        assert_eq!(clean("a\x1b[31mred\x07\u{9b}2J"), "a[31mred2J");
        assert_eq!(clean("one\ntwo\tthree"), "one two three");
        assert_eq!(clean("txt.\u{202e}exe"), "txt.exe");
        assert_eq!(clean("Grüße, 東京"), "Grüße, 東京");
    }
}
