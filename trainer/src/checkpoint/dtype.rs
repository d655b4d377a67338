//! Element types on disk, and their conversion from and to `f32`.

use half::{bf16, f16};
use serde::{Deserialize, Serialize};

#[cfg(target_endian = "big")]
compile_error!("tensor files are little-endian and are read without swapping bytes");

/// How an element is stored, spelled as in a safetensors header.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Dtype {
    /// IEEE single precision.
    F32,
    /// bfloat16.
    #[serde(rename = "BF16")]
    Bf16,
    /// IEEE half precision.
    F16,
}

impl Dtype {
    /// Bytes of one element.
    pub fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::Bf16 | Self::F16 => 2,
        }
    }

    /// The name in a safetensors header: `F32`, `BF16`, `F16`.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "F32",
            Self::Bf16 => "BF16",
            Self::F16 => "F16",
        }
    }

    /// The type of this safetensors name, if it is one of the three.
    pub fn from_name(name: &str) -> Option<Self> {
        match name {
            "F32" => Some(Self::F32),
            "BF16" => Some(Self::Bf16),
            "F16" => Some(Self::F16),
            _ => None,
        }
    }

    /// Decodes little-endian elements. Exact: both short types embed into `f32`.
    ///
    /// `bytes` may begin at any address; it holds `out.len()` elements.
    pub(crate) fn decode(self, bytes: &[u8], out: &mut [f32]) {
        debug_assert_eq!(bytes.len(), out.len() * self.bytes());
        match self {
            Self::F32 => {
                for (value, raw) in out.iter_mut().zip(bytes.as_chunks::<4>().0) {
                    *value = f32::from_le_bytes(*raw);
                }
            }
            Self::Bf16 => {
                for (value, raw) in out.iter_mut().zip(bytes.as_chunks::<2>().0) {
                    *value = f32::from_bits(u32::from(u16::from_le_bytes(*raw)) << 16);
                }
            }
            Self::F16 => {
                for (value, raw) in out.iter_mut().zip(bytes.as_chunks::<2>().0) {
                    *value = f16::from_le_bytes(*raw).to_f32();
                }
            }
        }
    }

    /// Appends `values` in this type to `out`, rounding to nearest, ties to even.
    pub(crate) fn encode(self, values: &[f32], out: &mut Vec<u8>) {
        match self {
            Self::F32 => out.extend_from_slice(bytemuck::cast_slice(values)),
            Self::Bf16 => out.extend(
                values
                    .iter()
                    .flat_map(|value| bf16::from_f32(*value).to_le_bytes()),
            ),
            Self::F16 => out.extend(
                values
                    .iter()
                    .flat_map(|value| f16::from_f32(*value).to_le_bytes()),
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn short_types_survive_a_round_trip_bit_for_bit() {
        for dtype in [Dtype::Bf16, Dtype::F16] {
            let bytes: Vec<u8> = (0..=u16::MAX).flat_map(u16::to_le_bytes).collect();
            let mut values = vec![0.0; bytes.len() / 2];
            dtype.decode(&bytes, &mut values);
            let mut again = Vec::new();
            dtype.encode(&values, &mut again);
            for (index, value) in values.iter().enumerate() {
                // Signalling NaNs come back quiet, as every conversion through a float unit does.
                if !value.is_nan() {
                    assert_eq!(
                        bytes[2 * index..2 * index + 2],
                        again[2 * index..2 * index + 2]
                    );
                }
            }
        }
    }

    #[test]
    fn encoding_rounds_to_nearest_even() {
        let mut out = Vec::new();
        // 1 + 2^-8 lies half way between two bfloat16 values; the even one is 1.
        Dtype::Bf16.encode(&[1.0 + 0.00390625, 1.0 + 3.0 * 0.00390625], &mut out);
        let mut back = [0.0; 2];
        Dtype::Bf16.decode(&out, &mut back);
        assert_eq!(back, [1.0, 1.0 + 4.0 * 0.00390625]);
    }

    #[test]
    fn names_round_trip() {
        for dtype in [Dtype::F32, Dtype::Bf16, Dtype::F16] {
            assert_eq!(Dtype::from_name(dtype.name()), Some(dtype));
        }
        assert_eq!(Dtype::from_name("F64"), None);
    }
}
