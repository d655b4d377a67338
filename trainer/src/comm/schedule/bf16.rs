//! Rounding of f32 values for the wire.

/// Rounds to the nearest bf16, ties to even; NaN stays NaN (made quiet, so that cutting the low
/// bits cannot turn it into infinity). Without branches, so that loops over it vectorise.
pub(super) fn to_bf16(value: f32) -> u16 {
    let bits = value.to_bits();
    let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1));
    let chosen = if value.is_nan() {
        bits | 0x0040_0000
    } else {
        rounded
    };
    (chosen >> 16) as u16
}

/// The value of a bf16.
pub(super) fn from_bf16(bits: u16) -> f32 {
    f32::from_bits(u32::from(bits) << 16)
}

/// Rounds `length` values for the wire.
///
/// # Safety
/// `source` and `target` lead to `length` valid, aligned elements in different allocations, and
/// nobody else uses those of the target.
pub(super) unsafe fn round_into(source: *const f32, target: *mut u16, length: usize) {
    // SAFETY: as above.
    let (source, target) = unsafe {
        (
            std::slice::from_raw_parts(source, length),
            std::slice::from_raw_parts_mut(target, length),
        )
    };
    for (target, &source) in target.iter_mut().zip(source) {
        *target = to_bf16(source);
    }
}

/// The other way round; the same conditions hold.
///
/// # Safety
/// As for [`round_into`].
pub(super) unsafe fn widen_into(source: *const u16, target: *mut f32, length: usize) {
    // SAFETY: as above.
    let (source, target) = unsafe {
        (
            std::slice::from_raw_parts(source, length),
            std::slice::from_raw_parts_mut(target, length),
        )
    };
    for (target, &source) in target.iter_mut().zip(source) {
        *target = from_bf16(source);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bf16_rounding_agrees_with_the_half_crate_on_every_exponent() {
        for high in 0..=u16::MAX {
            for low in [0u32, 1, 0x7fff, 0x8000, 0x8001, 0xffff] {
                let value = f32::from_bits(u32::from(high) << 16 | low);
                let expected = half::bf16::from_f32(value);
                if value.is_nan() {
                    assert!(from_bf16(to_bf16(value)).is_nan());
                } else {
                    assert_eq!(to_bf16(value), expected.to_bits(), "{value:e}");
                }
            }
        }
    }
}
