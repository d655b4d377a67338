//! Sizes of memory as people write them.

/// Units, the longest name first where one ends in another.
const UNITS: [(&str, u64); 9] = [
    ("KiB", 1 << 10),
    ("MiB", 1 << 20),
    ("GiB", 1 << 30),
    ("TiB", 1 << 40),
    ("kB", 1_000),
    ("MB", 1_000_000),
    ("GB", 1_000_000_000),
    ("TB", 1_000_000_000_000),
    ("B", 1),
];

/// Reads `24GiB`, `1.5 GB` or a plain number of bytes.
///
/// # Errors
/// A text that is no positive size, with what is expected.
pub fn parse(text: &str) -> Result<u64, String> {
    let trimmed = text.trim();
    let (number, unit) = UNITS
        .iter()
        .find_map(|&(name, bytes)| Some((trimmed.strip_suffix(name)?.trim_end(), bytes)))
        .unwrap_or((trimmed, 1));
    let bytes = number
        .parse::<f64>()
        .ok()
        .map(|number| number * unit as f64);
    match bytes {
        Some(bytes) if bytes >= 1.0 && bytes < (1u64 << 60) as f64 => Ok(bytes as u64),
        _ => Err(format!(
            "`{text}` is no size of memory; write a number with KiB, MiB, GiB, TiB, kB, MB, GB or \
             TB, such as 24GiB"
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_units_of_1024_and_of_1000() {
        for (text, bytes) in [
            ("24GiB", 24 << 30),
            ("1.5 GiB", 3 << 29),
            ("80GB", 80_000_000_000),
            ("4096", 4096),
            ("512 B", 512),
        ] {
            assert_eq!(parse(text), Ok(bytes), "{text}");
        }
        for wrong in ["", "GiB", "24G", "-1GiB", "0", "nan", "1e30TiB"] {
            assert!(
                parse(wrong).is_err_and(|error| error.contains(wrong)),
                "{wrong}"
            );
        }
    }
}
