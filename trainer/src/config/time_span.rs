//! Lengths of time: `"11h30m"`, or a whole number of seconds.
//!
//! # Grammar
//! One or more whole numbers, each with its unit, without spaces, the greater units first:
//! `d`, `h`, `m`, `s`, `ms`. A number may be larger than the next unit (`"90m"`). A span is longer
//! than nothing and at most 365 days, so that sums of a few never overflow.

use std::fmt;
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// Units, the greatest first, with their milliseconds.
const UNITS: [(&str, u64); 5] = [
    ("d", 24 * 60 * 60 * 1000),
    ("h", 60 * 60 * 1000),
    ("m", 60 * 1000),
    ("s", 1000),
    ("ms", 1),
];

/// The longest span.
const LONGEST_DAYS: u64 = 365;

/// A length of time, to the millisecond; in TOML `"11h30m"`, or a number of seconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "Written", into = "String")]
pub struct TimeSpan(Duration);

/// The two ways to write one.
#[derive(Deserialize)]
#[serde(untagged)]
enum Written {
    Seconds(u64),
    Text(String),
}

impl TimeSpan {
    /// The same for the standard library.
    pub fn duration(self) -> Duration {
        self.0
    }

    /// A whole number of seconds.
    ///
    /// # Errors
    /// What is wrong with it, in words that follow "which".
    pub(super) fn of_seconds(seconds: u64) -> Result<Self, String> {
        Self::of_milliseconds(seconds.checked_mul(1000))
    }

    /// Reads the grammar at the top of this module.
    ///
    /// # Errors
    /// What is wrong with the text, in words that follow "which".
    pub(super) fn parse(text: &str) -> Result<Self, String> {
        let mut total = Some(0u64);
        // Units that may still follow.
        let mut units = &UNITS[..];
        let mut rest = text;
        while !rest.is_empty() {
            let digits = leading(rest, |c| c.is_ascii_digit());
            rest = &rest[digits.len()..];
            let unit = leading(rest, |c| !c.is_ascii_digit());
            rest = &rest[unit.len()..];
            if digits.is_empty() {
                return Err(format!("has no number before {unit:?}"));
            }
            if unit.is_empty() {
                return Err(format!("has no unit after {digits}"));
            }
            let Some(at) = units.iter().position(|(name, _)| *name == unit) else {
                return Err(if UNITS.iter().any(|(name, _)| *name == unit) {
                    format!("has the unit {unit:?} twice or after a smaller one")
                } else {
                    format!("has the unknown unit {unit:?}")
                });
            };
            let amount = digits.parse::<u64>().ok();
            let amount = amount.and_then(|number| number.checked_mul(units[at].1));
            total = total
                .zip(amount)
                .and_then(|(total, amount)| total.checked_add(amount));
            units = &units[at + 1..];
        }
        Self::of_milliseconds(total)
    }

    /// `None` is a number past what can be counted.
    fn of_milliseconds(total: Option<u64>) -> Result<Self, String> {
        match total {
            Some(0) => Err("is no time at all".to_owned()),
            Some(total) if total <= LONGEST_DAYS * UNITS[0].1 => {
                Ok(Self(Duration::from_millis(total)))
            }
            _ => Err(format!("is longer than {LONGEST_DAYS} days")),
        }
    }
}

/// The longest beginning of a text whose characters all pass.
fn leading(text: &str, pass: impl Fn(char) -> bool) -> &str {
    &text[..text.find(|c| !pass(c)).unwrap_or(text.len())]
}

impl fmt::Display for TimeSpan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut left = self.0.as_millis() as u64;
        for (unit, milliseconds) in UNITS {
            let amount = left / milliseconds;
            left %= milliseconds;
            if amount > 0 {
                write!(f, "{amount}{unit}")?;
            }
        }
        Ok(())
    }
}

impl From<TimeSpan> for String {
    fn from(span: TimeSpan) -> Self {
        span.to_string()
    }
}

impl From<TimeSpan> for Duration {
    fn from(span: TimeSpan) -> Self {
        span.0
    }
}

impl TryFrom<Written> for TimeSpan {
    type Error = String;

    fn try_from(written: Written) -> Result<Self, String> {
        match written {
            Written::Seconds(seconds) => Self::of_seconds(seconds),
            Written::Text(text) => Self::parse(&text),
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use proptest::prelude::*;

    #[test]
    fn units_add_up() {
        let seconds = |text: &str| TimeSpan::parse(text).unwrap().duration().as_secs_f64();
        assert_eq!(seconds("11h30m"), 41_400.0);
        assert_eq!(seconds("90m"), 5_400.0);
        assert_eq!(seconds("45s"), 45.0);
        assert_eq!(seconds("1d2h3m4s500ms"), 93_784.5);
        assert_eq!(seconds("365d"), 31_536_000.0);
        assert_eq!(TimeSpan::parse("90m").unwrap().to_string(), "1h30m");
        assert_eq!(TimeSpan::of_seconds(86_400).unwrap().to_string(), "1d");
    }

    #[test]
    fn what_is_no_time_says_why() {
        let wrong = |text: &str| TimeSpan::parse(text).unwrap_err();
        assert_eq!(wrong("90"), "has no unit after 90");
        assert_eq!(wrong("1h30"), "has no unit after 30");
        assert_eq!(wrong("h"), "has no number before \"h\"");
        assert_eq!(wrong("-5s"), "has no number before \"-\"");
        assert_eq!(wrong("1.5h"), "has the unknown unit \".\"");
        assert_eq!(wrong("5min"), "has the unknown unit \"min\"");
        assert_eq!(wrong("5M"), "has the unknown unit \"M\"");
        assert_eq!(wrong("1h 30m"), "has the unknown unit \"h \"");
        assert_eq!(
            wrong("30m1h"),
            "has the unit \"h\" twice or after a smaller one"
        );
        assert_eq!(
            wrong("1h1h"),
            "has the unit \"h\" twice or after a smaller one"
        );
        assert_eq!(wrong("0s"), "is no time at all");
        assert_eq!(wrong("365d1ms"), "is longer than 365 days");
        assert_eq!(wrong("99999999999999999999s"), "is longer than 365 days");
        assert!(TimeSpan::of_seconds(u64::MAX).is_err());
    }

    proptest! {
        #[test]
        fn what_is_written_reads_back(milliseconds in 1u64..=365 * 24 * 60 * 60 * 1000) {
            let span = TimeSpan::of_milliseconds(Some(milliseconds)).unwrap();
            prop_assert_eq!(TimeSpan::parse(&span.to_string()), Ok(span));
        }

        #[test]
        fn arbitrary_text_never_panics(text in "[0-9dhms .µ-]{0,20}|\\PC{0,20}") {
            if let Ok(span) = TimeSpan::parse(&text) {
                prop_assert_eq!(TimeSpan::parse(&span.to_string()), Ok(span));
            }
        }
    }
}
