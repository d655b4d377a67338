//! Numbers as people read them: counts, bytes, durations, shares.

/// A count with thousands separated by commas: `1,234,567`.
pub fn grouped(count: u64) -> String {
    let digits = count.to_string();
    let mut text = String::with_capacity(digits.len() + digits.len() / 3);
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// A number to three significant digits with a decimal unit: `987`, `12.3k`, `1.05M`, `2.40B`.
///
/// Fractions below 1000 keep what three digits need: `0.5` becomes `0.5`, `12.34` becomes `12.3`.
pub fn compact(number: f64) -> String {
    if !number.is_finite() {
        return number.to_string();
    }
    let magnitude = number.abs();
    let (scaled, unit) = match magnitude {
        // The borders sit where rounding to three digits would carry into the next unit.
        m if m < 999.5 => return trimmed(number, ""),
        m if m < 999.5e3 => (number / 1e3, "k"),
        m if m < 999.5e6 => (number / 1e6, "M"),
        m if m < 999.5e9 => (number / 1e9, "B"),
        _ => (number / 1e12, "T"),
    };
    three_digits(scaled) + unit
}

/// A share between 0 and 1 as a percentage with one digit: `41.2%`.
pub fn percent(share: f64) -> String {
    format!("{:.1}%", share * 100.0)
}

/// Bytes with a binary unit: `512 B`, `1.50 KiB`, `12.0 GiB`.
pub fn bytes(count: u64) -> String {
    const UNITS: [&str; 6] = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    if count < 1024 {
        return format!("{count} B");
    }
    let mut scaled = count as f64 / 1024.0;
    let mut unit = 0;
    while scaled >= 1023.5 && unit + 1 < UNITS.len() {
        scaled /= 1024.0;
        unit += 1;
    }
    format!("{} {}", three_digits(scaled), UNITS[unit])
}

/// A duration in its two largest units: `0.42 s`, `12.3 s`, `4m05s`, `3h07m`, `2d04h`.
pub fn duration(seconds: f64) -> String {
    if !seconds.is_finite() || seconds < 0.0 {
        return "-".into();
    }
    if seconds < 59.95 {
        return if seconds < 10.0 {
            format!("{seconds:.2} s")
        } else {
            format!("{seconds:.1} s")
        };
    }
    let whole = seconds.round() as u64;
    let (days, hours, minutes) = (whole / 86_400, whole / 3600 % 24, whole / 60 % 60);
    if days > 0 {
        format!("{days}d{hours:02}h")
    } else if hours > 0 {
        format!("{hours}h{minutes:02}m")
    } else {
        format!("{minutes}m{:02}s", whole % 60)
    }
}

/// Three significant digits for a number of at least 1 and below 1024.
fn three_digits(number: f64) -> String {
    match number.abs() {
        n if n < 9.995 => format!("{number:.2}"),
        n if n < 99.95 => format!("{number:.1}"),
        _ => format!("{number:.0}"),
    }
}

/// At most three significant digits, without trailing zeros.
fn trimmed(number: f64, unit: &str) -> String {
    if number == 0.0 {
        return format!("0{unit}");
    }
    let decimals = (2 - number.abs().log10().floor() as i32).clamp(0, 12) as usize;
    let text = format!("{number:.decimals$}");
    let text = if text.contains('.') {
        text.trim_end_matches('0').trim_end_matches('.')
    } else {
        &text
    };
    format!("{text}{unit}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn thousands_are_separated() {
        for (count, text) in [
            (0, "0"),
            (999, "999"),
            (1000, "1,000"),
            (1_234_567, "1,234,567"),
        ] {
            assert_eq!(grouped(count), text);
        }
    }

    #[test]
    fn three_digits_and_a_unit() {
        let cases = [
            (0.0, "0"),
            (0.5, "0.5"),
            (0.0003, "0.0003"),
            (12.34, "12.3"),
            (500.0, "500"),
            (999.4, "999"),
            (999.6, "1.00k"),
            (12_345.0, "12.3k"),
            (999_600.0, "1.00M"),
            (786_432.0, "786k"),
            (2.4e9, "2.40B"),
            (1.4e13, "14.0T"),
            (-1500.0, "-1.50k"),
            (f64::NAN, "NaN"),
        ];
        for (number, text) in cases {
            assert_eq!(compact(number), text, "{number}");
        }
    }

    #[test]
    fn bytes_have_binary_units() {
        let cases = [
            (0, "0 B"),
            (1023, "1023 B"),
            (1536, "1.50 KiB"),
            (12 << 30, "12.0 GiB"),
            ((1 << 20) - 1, "1.00 MiB"),
            (u64::MAX, "16.0 EiB"),
        ];
        for (count, text) in cases {
            assert_eq!(bytes(count), text);
        }
    }

    #[test]
    fn durations_show_two_units() {
        let cases = [
            (0.421, "0.42 s"),
            (12.34, "12.3 s"),
            (59.96, "1m00s"),
            (245.0, "4m05s"),
            (11_220.0, "3h07m"),
            (187_200.0, "2d04h"),
            (f64::NAN, "-"),
        ];
        for (seconds, text) in cases {
            assert_eq!(duration(seconds), text, "{seconds}");
        }
    }
}
