//! A keyed bijection of `0..len` that can be evaluated at any point.
//!
//! A balanced Feistel network (Luby and Rackoff, 1988) over the smallest even number of bits that
//! holds the domain, with cycle walking (Black and Rogaway, 2002) back into it: at most four times
//! the domain, so about four steps on average in the worst case. Nothing is stored, so seeking is
//! free and a permutation of a billion documents costs no memory.

use crate::mix::mix64;

/// Rounds of the network; four already give a strong permutation, six leave a margin on the tiny
/// domains (a handful of row groups) that occur here.
const ROUNDS: u64 = 6;

/// A permutation of `0..len`, chosen by a key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Permutation {
    len: u64,
    key: u64,
    half_bits: u32,
}

impl Permutation {
    /// The permutation of `0..len` that belongs to `key`.
    pub fn new(len: u64, key: u64) -> Self {
        let bits = u64::BITS - len.saturating_sub(1).leading_zeros();
        Self {
            len,
            key,
            half_bits: bits.div_ceil(2),
        }
    }

    /// Number of elements.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether there is nothing to permute.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Where `index` goes; an index outside the domain stays where it is.
    pub fn apply(&self, index: u64) -> u64 {
        if index >= self.len || self.len < 2 {
            return index;
        }
        let mut value = index;
        // The walk follows a cycle of a permutation that contains `index` itself, so it returns
        // into the domain.
        loop {
            value = self.network(value);
            if value < self.len {
                return value;
            }
        }
    }

    fn network(&self, value: u64) -> u64 {
        let mask = (1u64 << self.half_bits) - 1;
        let (mut left, mut right) = (value >> self.half_bits, value & mask);
        for round in 0..ROUNDS {
            let scrambled = mix64(right ^ mix64(self.key ^ mix64(round))) & mask;
            (left, right) = (right, left ^ scrambled);
        }
        (left << self.half_bits) | right
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn is_a_bijection(len in 0u64..3000, key: u64) {
            let permutation = Permutation::new(len, key);
            let mut seen = vec![false; len as usize];
            for index in 0..len {
                let image = permutation.apply(index) as usize;
                prop_assert!(!seen[image], "{image} twice");
                seen[image] = true;
            }
        }
    }

    #[test]
    fn keys_give_different_orders_and_huge_domains_work() {
        let order = |key| {
            (0..100)
                .map(|i| Permutation::new(100, key).apply(i))
                .collect::<Vec<_>>()
        };
        assert_ne!(order(1), order(2));
        assert_ne!(order(1), (0..100).collect::<Vec<_>>());
        let huge = Permutation::new(u64::MAX, 7);
        assert_ne!(huge.apply(0), huge.apply(1));
    }

    /// Every permutation of three elements should turn up about equally often.
    #[test]
    fn small_domains_are_fair() {
        let mut counts = std::collections::HashMap::new();
        for key in 0..6000 {
            let p = Permutation::new(3, crate::mix::key(&[key]));
            *counts
                .entry([p.apply(0), p.apply(1), p.apply(2)])
                .or_insert(0u32) += 1;
        }
        assert_eq!(counts.len(), 6);
        assert!(
            counts.values().all(|&n| (800..1200).contains(&n)),
            "{counts:?}"
        );
    }
}
