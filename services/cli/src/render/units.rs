//! Amounts, rates, times and versions as people read them.

use jiff::Timestamp;

const UNITS: [&str; 6] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];

/// Clocks further apart than this are odd.
pub const ODD_CLOCK_MS: u64 = 2_000;

/// Bytes with a binary unit: `310 MiB`, `1.2 GiB`.
pub fn bytes(amount: u64) -> String {
    let unit = unit_of(amount);
    format!("{} {}", in_unit(amount, unit), UNITS[unit])
}

/// Moved of total, in the total's unit: `310/512 MiB`.
pub fn share(moved: u64, total: u64) -> String {
    let unit = unit_of(total);
    let (moved, total) = (in_unit(moved, unit), in_unit(total, unit));
    format!("{moved}/{total} {}", UNITS[unit])
}

/// What there is and is about to come, of what there may be, in one unit:
/// `0.5+0.1/4 GiB`, `512 MiB/-` where there may be any.
pub fn bytes_of(has: u64, soon: u64, most: Option<u64>) -> String {
    let unit = unit_of(has.saturating_add(soon).max(most.unwrap_or(0)));
    let soon = match soon {
        0 => String::new(),
        soon => format!("+{}", in_unit(soon, unit)),
    };
    let (has, name) = (in_unit(has, unit), UNITS[unit]);
    match most {
        Some(most) => format!("{has}{soon}/{} {name}", in_unit(most, unit)),
        None => format!("{has}{soon} {name}/-"),
    }
}

/// Bytes per second.
pub fn rate(bytes_s: u64) -> String {
    format!("{}/s", bytes(bytes_s))
}

/// MiB with a unit.
pub fn mib(amount: u64) -> String {
    bytes(amount.saturating_mul(1 << 20))
}

fn unit_of(amount: u64) -> usize {
    let mut unit = 0;
    let mut left = amount;
    while left >= 1024 && unit + 1 < UNITS.len() {
        left /= 1024;
        unit += 1;
    }
    unit
}

/// One decimal below ten, rounded down: what has not arrived is not shown.
fn in_unit(amount: u64, unit: usize) -> String {
    let size = 1_u128 << (10 * unit);
    let amount = u128::from(amount);
    let (whole, tenth) = (amount / size, amount % size * 10 / size);
    if unit > 0 && whole < 10 && tenth > 0 {
        format!("{whole}.{tenth}")
    } else {
        whole.to_string()
    }
}

/// A span of time: `212 ms`, `2.1 s`, `3 min 12 s`, `2 h 5 min`, `3 d 4 h`.
pub fn span(ms: u64) -> String {
    let s = ms / 1000;
    match s {
        0 => format!("{ms} ms"),
        1..60 => format!("{s}.{} s", ms % 1000 / 100),
        60..3600 => format!("{} min {} s", s / 60, s % 60),
        3600..86_400 => format!("{} h {} min", s / 3600, s % 3600 / 60),
        _ => format!("{} d {} h", s / 86_400, s % 86_400 / 3600),
    }
}

/// A running clock: `0:12`, `12:05`, `1:02:03`.
pub fn clock(ms: u64) -> String {
    let s = ms / 1000;
    let (hours, minutes, seconds) = (s / 3600, s / 60 % 60, s % 60);
    if hours > 0 {
        format!("{hours}:{minutes:02}:{seconds:02}")
    } else {
        format!("{minutes}:{seconds:02}")
    }
}

/// So many of something: `1 guest`, `6 guests`.
pub fn number(n: usize, what: &str) -> String {
    let plural = if n == 1 { "" } else { "s" };
    format!("{n} {what}{plural}")
}

/// A moment, in UTC: `2026-11-23 18:46:51Z`.
pub fn moment(ms: u64) -> String {
    let at = i64::try_from(ms).ok().map(Timestamp::from_millisecond);
    match at {
        Some(Ok(at)) => at.strftime("%Y-%m-%d %H:%M:%SZ").to_string(),
        _ => format!("{ms} ms"),
    }
}

/// A version number as libvirt counts: `9.0.0`.
pub fn version(number: u64) -> String {
    let (major, minor) = (number / 1_000_000, number / 1000 % 1000);
    format!("{major}.{minor}.{}", number % 1000)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn amounts_are_short() {
        let cases = [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1 KiB"),
            (1536, "1.5 KiB"),
            (310 << 20, "310 MiB"),
            ((1 << 30) + (1 << 28), "1.2 GiB"),
            (u64::MAX, "16383 PiB"),
        ];
        for (amount, text) in cases {
            assert_eq!(bytes(amount), text);
        }
        assert_eq!(share(310 << 20, 512 << 20), "310/512 MiB");
        assert_eq!(share(1 << 20, 2 << 30), "0/2 GiB");
        assert_eq!(rate(1 << 20), "1 MiB/s");
        assert_eq!(bytes_of(0, 0, None), "0 B/-");
        assert_eq!(bytes_of(0, 0, Some(4 << 30)), "0/4 GiB");
        assert_eq!(bytes_of(300 << 20, 100 << 20, Some(0)), "300+100/0 MiB");
    }

    #[test]
    fn times_are_short() {
        let cases = [
            (0, "0 ms"),
            (999, "999 ms"),
            (2_149, "2.1 s"),
            (192_000, "3 min 12 s"),
            (7_500_000, "2 h 5 min"),
            (273_600_000, "3 d 4 h"),
        ];
        for (ms, text) in cases {
            assert_eq!(span(ms), text);
        }
        let clocks = [12_900, 725_000, 3_723_000].map(clock);
        assert_eq!(clocks, ["0:12", "12:05", "1:02:03"]);
        assert_eq!(
            [number(1, "guest"), number(0, "guest")],
            ["1 guest", "0 guests"]
        );
        assert_eq!(moment(0), "1970-01-01 00:00:00Z");
        assert_eq!(moment(u64::MAX), format!("{} ms", u64::MAX));
        assert_eq!(version(9_000_002), "9.0.2");
    }
}
