//! Keyed mixing for data order.
//!
//! Data order must never change with a crate's release, so the few lines it rests on live here:
//! a 64-bit finaliser (the constants of SplitMix64, Steele, Lea and Flood, OOPSLA 2014) and a way
//! to fold a list of words into a key.

/// Scrambles 64 bits; a bijection with full avalanche.
pub(crate) fn mix64(mut x: u64) -> u64 {
    x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// A key from a list of words; the order of the words matters.
pub(crate) fn key(words: &[u64]) -> u64 {
    words.iter().fold(0x6f78_6974_726f_6e00, |state, &word| {
        mix64(state ^ mix64(word))
    })
}

/// A word for [`key`] from a name.
pub(crate) fn name_word(name: &str) -> u64 {
    xxhash_rust::xxh3::xxh3_64(name.as_bytes())
}

/// Whether `hash` falls into the first `fraction` of all 64-bit values.
pub(crate) fn below_fraction(hash: u64, fraction: f64) -> bool {
    // 53 bits, so that the comparison is exact in f64 on every machine.
    ((hash >> 11) as f64) < fraction * (1u64 << 53) as f64
}

/// 128-bit content hash as 32 hexadecimal digits.
pub(crate) fn content_hash(bytes: &[u8]) -> String {
    format!("{:032x}", xxhash_rust::xxh3::xxh3_128(bytes))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;

    /// The order of every existing run hangs on these values.
    #[test]
    fn values_never_change() {
        assert_eq!(mix64(0), 0xe220_a839_7b1d_cdaf);
        assert_eq!(mix64(1), 0x910a_2dec_8902_5cc1);
        assert_ne!(key(&[1, 2]), key(&[2, 1]));
    }

    #[test]
    fn fraction_is_a_share_of_the_range() {
        assert!(!below_fraction(0, 0.0));
        assert!(below_fraction(u64::MAX, 1.0));
        let hits = (0..10_000)
            .filter(|&i| below_fraction(mix64(i), 0.1))
            .count();
        assert!((900..1100).contains(&hits), "{hits}");
    }
}
