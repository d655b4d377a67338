//! Numbers that Python and Rust make alike without exchanging a file.
//!
//! Golden files in `tests/golden` hold only results; weights, tokens and projection vectors are
//! functions of a *stream* (a name) and an *index*. The definition stands in
//! `tests/oracle/counter_hash.py`, this is its twin, and `tests/golden/counter_hash.tsv` holds test
//! vectors for both. No dependencies: a test includes the file with `#[path = "…"] mod counter_hash;`.

// An including test uses the part it needs.
#![allow(dead_code)]

/// FNV-1a-64.
pub fn fnv1a(bytes: impl IntoIterator<Item = u8>) -> u64 {
    bytes.into_iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    })
}

/// A named, endless sequence of hashes, each reachable by its index.
#[derive(Clone, Copy, Debug)]
pub struct Stream {
    key: u64,
}

impl Stream {
    /// The stream of this name.
    pub fn new(name: &str) -> Self {
        Self {
            key: fnv1a(name.bytes()),
        }
    }

    /// The hash at `index`: splitmix64's output of that number from the stream's key.
    pub fn bits(self, index: u64) -> u64 {
        let step = index.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let z = self.key.wrapping_add(step);
        let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number in [-1, 1) at `index`, a multiple of 2⁻²³ and therefore exact.
    pub fn uniform(self, index: u64) -> f32 {
        const HALF: i32 = 1 << 23;
        // 24 bits: the conversions lose nothing.
        ((self.bits(index) >> 40) as i32 - HALF) as f32 / HALF as f32
    }
}

/// Scales of the four kinds of weights; powers of two, so that only one rounding happens.
#[derive(Clone, Copy, Debug)]
pub struct Scales {
    /// Of `model.embed_tokens.weight`.
    pub embedding: f32,
    /// Of projections and of `lm_head.weight`.
    pub linear: f32,
    /// Of the projections into the residual stream, `o_proj` and `down_proj`.
    pub residual: f32,
    /// Of norms, around 1.
    pub norm: f32,
}

/// The first `count` elements, in row-major order, of the tensor with this Hugging Face name.
pub fn weight(name: &str, count: usize, scales: Scales) -> Vec<f32> {
    let (offset, scale) = if name.ends_with("norm.weight") {
        (1.0, scales.norm)
    } else if name == "model.embed_tokens.weight" {
        (0.0, scales.embedding)
    } else if name.ends_with("o_proj.weight") || name.ends_with("down_proj.weight") {
        (0.0, scales.residual)
    } else {
        (0.0, scales.linear)
    };
    let stream = Stream::new(name);
    (0..count as u64)
        .map(|index| offset + scale * stream.uniform(index))
        .collect()
}

/// Projection number `which` of a tensor: its product with a fixed vector in [-1, 1)ⁿ.
///
/// The expected square of an error's projection is a third of the error's squared length.
pub fn projection(name: &str, which: usize, values: &[f32]) -> f64 {
    let stream = Stream::new(&format!("projection/{which}/{name}"));
    let terms = values.iter().zip(0..);
    terms
        .map(|(&value, index)| f64::from(stream.uniform(index)) * f64::from(value))
        .sum()
}

/// `total` tokens of documents of `shortest..=longest` tokens, and each token's document number.
///
/// Three of four tokens follow from their predecessor, so a model can learn something.
pub fn documents(
    name: &str,
    total: usize,
    vocab: u64,
    shortest: u64,
    longest: u64,
) -> (Vec<u32>, Vec<u32>) {
    let lengths = Stream::new(&format!("{name}/lengths"));
    let draws = Stream::new(&format!("{name}/tokens"));
    let (mut tokens, mut numbers) = (Vec::with_capacity(total), Vec::with_capacity(total));
    let (mut document, mut left) = (0, 0);
    let mut previous = 0;
    for index in 0..total as u64 {
        let begins = left == 0;
        if begins {
            left = shortest + lengths.bits(document) % (longest - shortest + 1);
            document += 1;
        }
        left -= 1;
        let draw = draws.bits(index);
        previous = if begins || draw.is_multiple_of(4) {
            (draw >> 32) % vocab
        } else {
            (5 * previous + 17) % vocab
        };
        tokens.push(previous as u32);
        numbers.push(document as u32 - 1);
    }
    (tokens, numbers)
}

/// FNV-1a-64 over tokens as little-endian 32-bit words.
pub fn checksum(tokens: &[u32]) -> u64 {
    fnv1a(tokens.iter().flat_map(|token| token.to_le_bytes()))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

    use super::*;

    /// The lines of one kind: stream, argument, expected.
    fn vectors(kind: &str) -> Vec<[&'static str; 3]> {
        let lines = include_str!("../golden/counter_hash.tsv").lines();
        let fields = lines
            .filter(|line| !line.starts_with('#'))
            .map(|line| line.split('\t'));
        let found: Vec<_> = fields
            .map(|mut field| [(); 4].map(|()| field.next().expect("a line of four fields")))
            .filter(|line| line[0] == kind)
            .map(|[_, stream, argument, expected]| [stream, argument, expected])
            .collect();
        assert!(!found.is_empty(), "no test vector of kind {kind}");
        found
    }

    #[test]
    fn hashes_match_python() {
        for [stream, index, expected] in vectors("bits") {
            let bits = Stream::new(stream).bits(index.parse().unwrap());
            assert_eq!(format!("{bits:016x}"), expected, "{stream:?} at {index}");
        }
    }

    #[test]
    fn uniform_numbers_match_python_bit_for_bit() {
        for [stream, index, expected] in vectors("uniform") {
            let value = Stream::new(stream).uniform(index.parse().unwrap());
            assert_eq!(
                format!("{:08x}", value.to_bits()),
                expected,
                "{stream:?} at {index}"
            );
        }
    }

    #[test]
    fn weights_match_python_bit_for_bit() {
        for [name, argument, expected] in vectors("weight") {
            let (index, scale) = argument.split_once('/').unwrap();
            let index: usize = index.parse().unwrap();
            let scale: f32 = scale.parse().unwrap();
            let scales = Scales {
                embedding: scale,
                linear: scale,
                residual: scale,
                norm: scale,
            };
            let value = weight(name, index + 1, scales)[index];
            assert_eq!(
                format!("{:08x}", value.to_bits()),
                expected,
                "{name} at {index}"
            );
        }
    }

    #[test]
    fn projections_match_python() {
        for [name, argument, expected] in vectors("projection") {
            let (which, scale) = argument.split_once('/').unwrap();
            let scale: f32 = scale.parse().unwrap();
            let scales = Scales {
                embedding: scale,
                linear: scale,
                residual: scale,
                norm: scale,
            };
            let found = projection(name, which.parse().unwrap(), &weight(name, 1000, scales));
            let expected: f64 = expected.parse().unwrap();
            // Python sums in another order.
            assert!(
                (found - expected).abs() <= 1e-12 * expected.abs(),
                "{name}: {found}"
            );
        }
    }

    #[test]
    fn documents_match_python() {
        for [stream, argument, expected] in vectors("documents") {
            let n: Vec<u64> = argument.split(',').map(|n| n.parse().unwrap()).collect();
            let (tokens, numbers) = documents(stream, n[0] as usize, n[1], n[2], n[3]);
            let found = format!("{:016x},{:016x}", checksum(&tokens), checksum(&numbers));
            assert_eq!(found, expected, "{stream}");
        }
    }

    #[test]
    fn kinds_take_their_own_scale() {
        let scales = Scales {
            embedding: 0.5,
            linear: 0.25,
            residual: 0.0625,
            norm: 0.125,
        };
        let largest = |name: &str, offset: f32| {
            let values = weight(name, 4096, scales);
            values
                .iter()
                .fold(0.0_f32, |most, value| most.max((value - offset).abs()))
        };
        assert!((0.05..=0.0625).contains(&largest("model.layers.0.mlp.down_proj.weight", 0.0)));
        assert!((0.05..=0.0625).contains(&largest("model.layers.0.self_attn.o_proj.weight", 0.0)));
        assert!((0.45..=0.5).contains(&largest("model.embed_tokens.weight", 0.0)));
        assert!((0.2..=0.25).contains(&largest("lm_head.weight", 0.0)));
        assert!((0.2..=0.25).contains(&largest("model.layers.0.mlp.up_proj.weight", 0.0)));
        assert!((0.1..=0.125).contains(&largest("model.layers.0.input_layernorm.weight", 1.0)));
    }

    /// Four projections tell the length of a vector within a factor of two or so; here many are
    /// averaged, which shows the factor 1/3.
    #[test]
    fn projections_measure_length() {
        let values = weight(
            "model.layers.0.mlp.up_proj.weight",
            2000,
            Scales {
                embedding: 1.0,
                linear: 1.0,
                residual: 1.0,
                norm: 1.0,
            },
        );
        let square: f64 = values.iter().map(|&value| f64::from(value).powi(2)).sum();
        let count = 400;
        let mean: f64 = (0..count)
            .map(|which| projection("t", which, &values).powi(2))
            .sum::<f64>()
            / count as f64;
        assert!(
            (3.0 * mean / square - 1.0).abs() < 0.2,
            "{}",
            3.0 * mean / square
        );
    }
}
