//! Amounts in words, for people.

/// A rate: `210 MiB/s`.
pub fn rate(bytes_s: u64) -> String {
    const MIB: u64 = 1 << 20;
    match bytes_s {
        0 => "nothing".to_owned(),
        b if b < MIB => format!("{} KiB/s", (b >> 10).max(1)),
        b if b < 10 * MIB => format!("{}.{} MiB/s", b / MIB, b % MIB * 10 / MIB),
        b => format!("{} MiB/s", b / MIB),
    }
}

/// A time: `150 s`, `12 min`.
pub fn duration(ms: u64) -> String {
    match ms {
        0..1_000 => format!("{ms} ms"),
        1_000..600_000 => format!("{} s", ms / 1_000),
        _ => format!("{} min", ms / 60_000),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn amounts_read_well() {
        assert_eq!(rate(0), "nothing");
        assert_eq!(rate(10), "1 KiB/s");
        assert_eq!(rate(3 << 19), "1.5 MiB/s");
        assert_eq!(rate(210 << 20), "210 MiB/s");
        assert_eq!(duration(150), "150 ms");
        assert_eq!(duration(150_000), "150 s");
        assert_eq!(duration(720_000), "12 min");
    }
}
