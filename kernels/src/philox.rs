//! Philox4x32-10, a counter-based generator (Salmon et al., "Parallel random numbers: as easy as
//! 1, 2, 3", 2011), and initial values made with it.
//!
//! The value of an element is a function of (seed, tensor name, global index) alone: whoever owns
//! a slice of a tensor fills it without knowing how the rest is split. Element `i` is word `i % 4`
//! of the block with counter `i / 4`; the name enters through the counter's upper half, the seed
//! is the key.

use std::f64::consts::TAU;

use crate::sys::parallel::parallel_split;
use crate::sys::split::Rows;

/// Multipliers and key increments of the paper.
const M0: u32 = 0xD251_1F53;
const M1: u32 = 0xCD9E_8D57;
const W0: u32 = 0x9E37_79B9;
const W1: u32 = 0xBB67_AE85;

/// Elements of one block of the parallel loop.
const GRAIN: usize = 4096;

/// Ten rounds of Philox over a 128-bit counter and a 64-bit key.
pub fn philox4x32_10(counter: [u32; 4], key: [u32; 2]) -> [u32; 4] {
    let [mut c0, mut c1, mut c2, mut c3] = counter;
    let [mut k0, mut k1] = key;
    for _ in 0..10 {
        let p0 = u64::from(M0) * u64::from(c0);
        let p1 = u64::from(M1) * u64::from(c2);
        (c0, c1, c2, c3) = (
            (p1 >> 32) as u32 ^ c1 ^ k0,
            p1 as u32,
            (p0 >> 32) as u32 ^ c3 ^ k1,
            p0 as u32,
        );
        k0 = k0.wrapping_add(W0);
        k1 = k1.wrapping_add(W1);
    }
    [c0, c1, c2, c3]
}

/// Fills `out` with elements `start..` of the tensor `name`: normal, mean 0, deviation `std`.
///
/// Box–Muller in fp64, rounded once to fp32; no value lies further out than 6.7 deviations.
pub fn fill_normal(out: &mut [f32], seed: u64, name: &str, start: u64, std: f32) {
    let deviation = f64::from(std);
    fill(out, seed, name, start, |words| {
        let [a, b] = normal_pair(words[0], words[1]);
        let [c, d] = normal_pair(words[2], words[3]);
        [a, b, c, d].map(|value| (value * deviation) as f32)
    });
}

/// Fills `out` with elements `start..` of the tensor `name`: uniform in `[low, high)` (up to
/// rounding at the upper end), 24 random bits each.
pub fn fill_uniform(out: &mut [f32], seed: u64, name: &str, start: u64, low: f32, high: f32) {
    let (low, width) = (f64::from(low), f64::from(high) - f64::from(low));
    fill(out, seed, name, start, |words| {
        words.map(|word| (low + width * f64::from(word >> 8) / f64::from(1 << 24)) as f32)
    });
}

/// Two independent standard normal numbers from 64 random bits.
fn normal_pair(a: u32, b: u32) -> [f64; 2] {
    const UNIT: f64 = 1.0 / 4_294_967_296.0;
    let radius = (-2.0 * ((f64::from(a) + 1.0) * UNIT).ln()).sqrt();
    let (sin, cos) = (TAU * f64::from(b) * UNIT).sin_cos();
    [radius * cos, radius * sin]
}

fn fill(
    out: &mut [f32],
    seed: u64,
    name: &str,
    start: u64,
    values: impl Fn([u32; 4]) -> [f32; 4] + Sync,
) {
    let key = [seed as u32, (seed >> 32) as u32];
    let stream = name_hash(name);
    let blocks = out.len().div_ceil(GRAIN);
    parallel_split(blocks, 1, Rows::new(out, GRAIN), |range, out| {
        let first = start + (range.start * GRAIN) as u64;
        let mut done = 0;
        while done < out.len() {
            let index = first + done as u64;
            let block = index / 4;
            let counter = [
                block as u32,
                (block >> 32) as u32,
                stream as u32,
                (stream >> 32) as u32,
            ];
            let words = values(philox4x32_10(counter, key));
            for value in &words[(index % 4) as usize..] {
                if let Some(slot) = out.get_mut(done) {
                    *slot = *value;
                }
                done += 1;
            }
        }
    });
}

/// FNV-1a of the name, 64 bits: part of the definition of initial values, never to change.
fn name_hash(name: &str) -> u64 {
    name.bytes().fold(0xCBF2_9CE4_8422_2325, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01B3)
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;

    #[test]
    fn known_answers_of_random123() {
        // kat_vectors of the Random123 distribution, philox4x32 with 10 rounds.
        let cases = [
            (
                [0; 4],
                [0; 2],
                [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8],
            ),
            (
                [!0; 4],
                [!0; 2],
                [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd],
            ),
            (
                [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344],
                [0xa409_3822, 0x299f_31d0],
                [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1],
            ),
        ];
        for (counter, key, expected) in cases {
            assert_eq!(philox4x32_10(counter, key), expected);
        }
    }

    #[test]
    fn any_split_gives_the_same_values() {
        let mut whole = vec![0.0; 20_000];
        fill_normal(&mut whole, 42, "layers.0.wq", 5, 0.02);
        let mut parts = vec![0.0; 20_000];
        let mut start = 0;
        for end in [1, 3, 4, 4097, 4098, 12_345, 20_000] {
            fill_normal(
                &mut parts[start..end],
                42,
                "layers.0.wq",
                5 + start as u64,
                0.02,
            );
            start = end;
        }
        assert_eq!(whole, parts);
        let mut far = [0.0; 2];
        fill_normal(&mut far, 42, "x", (1 << 34) - 1, 1.0);
        let mut second = [0.0];
        fill_normal(&mut second, 42, "x", 1 << 34, 1.0);
        assert_eq!(far[1], second[0], "the counter must carry past 32 bits");
    }

    #[test]
    fn seed_name_and_index_matter_and_moments_are_right() {
        let n = 200_000;
        let draw = |seed, name: &str| {
            let mut values = vec![0.0; n];
            fill_normal(&mut values, seed, name, 0, 2.0);
            values
        };
        let a = draw(1, "a");
        assert_ne!(a, draw(2, "a"));
        assert_ne!(a, draw(1 << 32 | 1, "a"));
        assert_ne!(a, draw(1, "b"));
        let moment = |p: i32| a.iter().map(|&x| f64::from(x / 2.0).powi(p)).sum::<f64>() / n as f64;
        assert!(moment(1).abs() < 0.01, "mean {}", moment(1));
        assert!((moment(2) - 1.0).abs() < 0.02, "variance {}", moment(2));
        assert!(
            (moment(4) - 3.0).abs() < 0.15,
            "fourth moment {}",
            moment(4)
        );
        let mut uniform = vec![0.0; n];
        fill_uniform(&mut uniform, 1, "u", 0, -1.0, 3.0);
        assert!(uniform.iter().all(|x| (-1.0..=3.0).contains(x)));
        let mean = uniform.iter().map(|&x| f64::from(x)).sum::<f64>() / n as f64;
        assert!((mean - 1.0).abs() < 0.02, "mean {mean}");
    }

    #[test]
    fn the_definition_does_not_change() {
        // Made by an independent implementation in Python. Runs are reproducible across releases
        // only as long as these values stay.
        assert_eq!(name_hash("model.norm.weight"), 0xd6d6e5afd11604e4);
        let mut values = [0.0; 3];
        fill_normal(&mut values, 1234, "model.norm.weight", 2, 1.0);
        assert_eq!(
            values.map(f32::to_bits),
            [0xbf9ac69d, 0x3eaee988, 0x3f0a7a88]
        );
    }
}
