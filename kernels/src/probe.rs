//! What this processor does fast.

/// Who made the processor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Vendor {
    /// "GenuineIntel".
    Intel,
    /// Anyone else.
    Other,
}

/// Whether to compute in bf16 on this CPU, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bf16Preference {
    /// True where bf16 products are faster than fp32 ones.
    pub prefer: bool,
    /// The reason in words, to be shown to the user.
    pub reason: String,
}

/// Decides between bf16 and fp32 for training on this CPU.
///
/// The decision follows processor features, not a measurement, so that the same machine always
/// decides alike: matrices of bf16 are multiplied natively where the processor has AVX512-BF16 (with
/// AMX as well, many times faster); elsewhere they are widened or emulated, no faster than fp32.
/// Measured on Zen 4, which has AVX512-BF16 without AMX: 430 GFLOP/s in bf16 against 210 in fp32.
pub fn cpu_prefers_bf16() -> Bf16Preference {
    let (prefer, reason) = if !has_avx512_bf16() {
        (
            false,
            "the processor has no AVX512-BF16, so bf16 products would be emulated",
        )
    } else if has_amx_bf16() {
        (
            true,
            "the processor multiplies bf16 matrices natively (AMX)",
        )
    } else {
        (
            true,
            "the processor multiplies bf16 vectors natively (AVX512-BF16)",
        )
    };
    Bf16Preference {
        prefer,
        reason: reason.to_owned(),
    }
}

/// Who made this processor.
#[cfg(target_arch = "x86_64")]
pub fn vendor() -> Vendor {
    let leaf = std::arch::x86_64::__cpuid(0);
    let name = [leaf.ebx, leaf.edx, leaf.ecx]
        .map(u32::to_le_bytes)
        .concat();
    if name == b"GenuineIntel" {
        Vendor::Intel
    } else {
        Vendor::Other
    }
}

/// Whether the processor and the system offer AVX512-BF16.
#[cfg(target_arch = "x86_64")]
pub fn has_avx512_bf16() -> bool {
    is_x86_feature_detected!("avx512bf16")
}

/// Whether the processor has AMX tiles for bf16.
#[cfg(target_arch = "x86_64")]
pub fn has_amx_bf16() -> bool {
    use std::arch::x86_64::{__cpuid, __cpuid_count};
    // Leaf 7, EDX bit 22; the detection macro does not know it on stable Rust.
    __cpuid(0).eax >= 7 && __cpuid_count(7, 0).edx & (1 << 22) != 0
}

/// Who made this processor.
#[cfg(not(target_arch = "x86_64"))]
pub fn vendor() -> Vendor {
    Vendor::Other
}

/// Whether the processor and the system offer AVX512-BF16.
#[cfg(not(target_arch = "x86_64"))]
pub fn has_avx512_bf16() -> bool {
    false
}

/// Whether the processor has AMX tiles for bf16.
#[cfg(not(target_arch = "x86_64"))]
pub fn has_amx_bf16() -> bool {
    false
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;

    #[test]
    fn the_reason_matches_the_answer() {
        let answer = cpu_prefers_bf16();
        assert_eq!(answer.prefer, has_avx512_bf16());
        assert_eq!(answer.prefer, answer.reason.contains("natively"));
        println!("bf16 preferred: {} ({})", answer.prefer, answer.reason);
    }
}
