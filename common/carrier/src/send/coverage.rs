//! Which bytes of a file are accounted for.

use std::collections::BTreeMap;

use crate::extents::Range;

/// Disjoint ranges, those that touch made one. A transfer goes through a file
/// from front to back, so there are never many.
#[derive(Debug, Default)]
pub(super) struct Coverage {
    /// Start and end.
    ranges: BTreeMap<u64, u64>,
}

impl Coverage {
    /// Adds a range. False, and nothing added, if part of it is in already:
    /// then somebody has counted twice.
    pub(super) fn add(&mut self, range: Range) -> bool {
        let Range { mut start, mut end } = range;
        if start >= end {
            return true;
        }
        if let Some((&before, &until)) = self.ranges.range(..=start).next_back() {
            if until > start {
                return false;
            }
            if until == start {
                start = before;
            }
        }
        if let Some((&after, &until)) = self.ranges.range(range.start..).next() {
            if after < end {
                return false;
            }
            if after == end {
                self.ranges.remove(&after);
                end = until;
            }
        }
        self.ranges.insert(start, end);
        true
    }

    /// Whether it is all of a file of this length, and nothing else.
    pub(super) fn is_all(&self, len: u64) -> bool {
        let mut ranges = self.ranges.iter();
        match (ranges.next(), ranges.next()) {
            (None, None) => len == 0,
            (Some(only), None) => only == (&0, &len),
            _ => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_grow_together_in_any_order() {
        let mut coverage = Coverage::default();
        for start in [5, 1, 3, 0, 4, 2] {
            assert!(!coverage.is_all(6));
            assert!(coverage.add(start..start + 1));
        }
        assert!(coverage.is_all(6));
        assert_eq!(coverage.ranges.len(), 1);
    }

    #[test]
    fn nothing_counts_twice() {
        let mut coverage = Coverage::default();
        assert!(coverage.add(10..20));
        for again in [10..11, 9..11, 19..21, 0..30, 12..13] {
            assert!(!coverage.add(again));
        }
        assert!(coverage.add(0..10));
        assert!(coverage.is_all(20));
        assert!(!coverage.is_all(21));
        assert!(Coverage::default().is_all(0));
    }
}
