//! What GPUs do at most: the denominator of MFU and HFU.

/// Dense bf16 products with fp32 sums, in 10¹² operations per second, by words of the name that the
/// driver gives a GPU; the first row whose words all occur counts.
///
/// Source: NVIDIA's data sheets of the products (those of H100, H200, B200, GB200, L40S and newer
/// state the figure with sparsity, which is twice the dense one). Boards of one name that differ in
/// power or memory differ in what they reach, not in this figure.
const TFLOPS: &[(&[&str], f64)] = &[
    (&["GB200"], 2500.0),
    (&["B200"], 2250.0),
    (&["H200", "NVL"], 835.0),
    (&["H200"], 989.0),
    (&["GH200"], 989.0),
    (&["H100", "PCIe"], 756.0),
    (&["H100", "NVL"], 835.0),
    (&["H100"], 989.0),
    (&["H800", "PCIe"], 756.0),
    (&["H800"], 989.0),
    (&["H20"], 148.0),
    (&["A100"], 312.0),
    (&["A800"], 312.0),
    (&["A40"], 149.7),
    (&["A30"], 165.0),
    (&["A10"], 125.0),
    (&["L40S"], 362.0),
    (&["L40"], 181.0),
    (&["L4"], 121.0),
];

/// Most bf16 operations per second of the GPU that the driver calls `name`, in 10¹²; `None` for one
/// that is not in the table, and for a part of a GPU (MIG).
pub fn bf16_tflops(name: &str) -> Option<f64> {
    let words: Vec<&str> = name
        .split(|c: char| !c.is_ascii_alphanumeric())
        .filter(|word| !word.is_empty())
        .collect();
    let has = |wanted: &str| words.iter().any(|word| word.eq_ignore_ascii_case(wanted));
    if has("MIG") {
        return None;
    }
    TFLOPS
        .iter()
        .find(|(wanted, _)| wanted.iter().all(|&word| has(word)))
        .map(|&(_, peak)| peak)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_as_drivers_give_them() {
        for (name, peak) in [
            ("NVIDIA H100 80GB HBM3", Some(989.0)),
            ("NVIDIA H100 PCIe", Some(756.0)),
            ("NVIDIA H100 NVL", Some(835.0)),
            ("NVIDIA H200", Some(989.0)),
            ("NVIDIA H200 NVL", Some(835.0)),
            ("NVIDIA GH200 480GB", Some(989.0)),
            ("NVIDIA B200", Some(2250.0)),
            ("NVIDIA GB200", Some(2500.0)),
            ("NVIDIA A100-SXM4-80GB", Some(312.0)),
            ("NVIDIA A100 80GB PCIe", Some(312.0)),
            ("NVIDIA L40S", Some(362.0)),
            ("NVIDIA L40", Some(181.0)),
            ("NVIDIA H200 MIG 1g.18gb", None),
            ("NVIDIA A1000", None),
            ("NVIDIA GeForce RTX 4090", None),
            ("", None),
        ] {
            assert_eq!(bf16_tflops(name), peak, "{name}");
        }
    }
}
