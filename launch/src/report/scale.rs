//! From values to places on an axis, and where its ticks stand.

/// An axis from `low` to `high`, linear or logarithmic.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Scale {
    pub(super) low: f64,
    pub(super) high: f64,
    pub(super) log: bool,
}

/// Ticks that an axis has room for, about.
const TICKS: usize = 5;

impl Scale {
    /// A linear axis over exactly this range.
    pub(super) fn exact(low: f64, high: f64) -> Self {
        Self {
            low,
            high: if high > low { high } else { low + 1.0 },
            log: false,
        }
    }

    /// A linear axis from 0 that ends on the tick above every value.
    pub(super) fn from_zero(values: impl Iterator<Item = f64>) -> Self {
        let high = values.filter(|value| value.is_finite()).fold(0.0, f64::max);
        let step = nice_step(high / TICKS as f64);
        Self::exact(0.0, (high / step).ceil() * step)
    }

    /// An axis around the values: logarithmic where the largest is more than `ratio` times the
    /// smallest, because then a linear one would show only the largest.
    pub(super) fn around(values: impl Iterator<Item = f64> + Clone, ratio: f64) -> Self {
        let finite = values.filter(|value| value.is_finite());
        let (low, high) = (
            finite.clone().fold(f64::INFINITY, f64::min),
            finite.fold(f64::NEG_INFINITY, f64::max),
        );
        if low > high {
            return Self::exact(0.0, 1.0);
        }
        if low > 0.0 && high / low > ratio {
            let margin = (high / low).powf(0.04);
            return Self {
                low: low / margin,
                high: high * margin,
                log: true,
            };
        }
        let step = nice_step((high - low).max(high.abs() * 0.02) / TICKS as f64);
        Self::exact((low / step).floor() * step, (high / step).ceil() * step)
    }

    /// Where a value stands: 0 at `low`, 1 at `high`, beyond them outside. NaN stays NaN.
    pub(super) fn position(&self, value: f64) -> f64 {
        if self.log {
            // A value that a logarithm cannot show lies below everything.
            if value <= 0.0 {
                -1.0
            } else {
                (value / self.low).ln() / (self.high / self.low).ln()
            }
        } else {
            (value - self.low) / (self.high - self.low)
        }
    }

    /// Round values to mark, rising, all inside the axis.
    pub(super) fn ticks(&self) -> Vec<f64> {
        let decades = (self.high / self.low).log10();
        if !self.log {
            return self.even_ticks();
        }
        let digits: &[f64] = match decades {
            d if d < 0.9 => &[1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0],
            d if d < 1.5 => &[1.0, 2.0, 3.0, 5.0],
            d if d < 3.0 => &[1.0, 2.0, 5.0],
            _ => &[1.0],
        };
        let exponents = self.low.log10().floor() as i32..=self.high.log10().ceil() as i32;
        let stride = (decades / 7.0).ceil().max(1.0) as usize;
        exponents
            .step_by(stride)
            .flat_map(|exponent| digits.iter().map(move |digit| digit * 10f64.powi(exponent)))
            .filter(|tick| (self.low..=self.high).contains(tick))
            .collect()
    }

    fn even_ticks(&self) -> Vec<f64> {
        let step = nice_step((self.high - self.low) / TICKS as f64);
        let (first, last) = (self.low / step, self.high / step);
        // The slack keeps a tick that rounding pushed just outside.
        let (first, last) = ((first - 1e-9).ceil() as i64, (last + 1e-9).floor() as i64);
        (first..=last).map(|index| index as f64 * step).collect()
    }

    /// The ticks as text: on a linear axis all in one unit and to the same digit, on a logarithmic
    /// one each in its own.
    pub(super) fn labels(&self) -> Vec<String> {
        let ticks = self.ticks();
        if self.log {
            ticks.chunks(1).flat_map(labels).collect()
        } else {
            labels(&ticks)
        }
    }
}

/// The one of 1, 2, 2.5, 5, 10 times a power of ten that is nearest to `rough` by ratio.
fn nice_step(rough: f64) -> f64 {
    if !(rough.is_finite() && rough > 0.0) {
        return 1.0;
    }
    let power = 10f64.powf(rough.log10().floor());
    // Below each border (the geometric mean of its neighbours) lies the digit beside it.
    let borders = [(1.41, 1.0), (2.24, 2.0), (3.54, 2.5), (7.07, 5.0)];
    let nearest = borders
        .into_iter()
        .find(|(border, _)| rough / power < *border);
    nearest.map_or(10.0, |(_, digit)| digit) * power
}

fn labels(ticks: &[f64]) -> Vec<String> {
    let largest = ticks
        .iter()
        .fold(0.0f64, |largest, tick| largest.max(tick.abs()));
    let (divisor, unit) = match largest {
        m if m >= 1e12 => (1e12, "T".to_owned()),
        m if m >= 1e9 => (1e9, "B".to_owned()),
        m if m >= 1e6 => (1e6, "M".to_owned()),
        m if m >= 1e4 => (1e3, "k".to_owned()),
        m if m >= 1e-2 || m == 0.0 => (1.0, String::new()),
        m => {
            let exponent = m.log10().floor() as i32;
            (10f64.powi(exponent), format!("e{exponent}"))
        }
    };
    // The fewest decimals that tell every tick truly.
    let exact = |decimals: usize| {
        ticks.iter().all(|tick| {
            let scaled = tick / divisor;
            let shown = format!("{scaled:.decimals$}").parse().unwrap_or(f64::NAN);
            (scaled - shown).abs() <= scaled.abs() * 1e-6
        })
    };
    let decimals = (0..6).find(|decimals| exact(*decimals)).unwrap_or(6);
    let label = |tick: &f64| match *tick {
        0.0 => "0".to_owned(),
        tick => format!("{:.decimals$}{unit}", tick / divisor),
    };
    ticks.iter().map(label).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn linear_axes_end_on_round_ticks() {
        let scale = Scale::from_zero([12_345.0, f64::NAN, 9_000.0].into_iter());
        assert_eq!((scale.low, scale.high), (0.0, 12_500.0));
        assert_eq!(
            scale.labels(),
            ["0", "2.5k", "5.0k", "7.5k", "10.0k", "12.5k"]
        );
        assert_eq!(scale.position(6_250.0), 0.5);
    }

    #[test]
    fn small_numbers_share_an_exponent() {
        let scale = Scale::from_zero([3e-4].into_iter());
        assert_eq!(
            scale.labels(),
            [
                "0", "0.5e-4", "1.0e-4", "1.5e-4", "2.0e-4", "2.5e-4", "3.0e-4"
            ]
        );
    }

    #[test]
    fn a_wide_range_becomes_logarithmic() {
        let scale = Scale::around([2.0, 9.0].into_iter(), 3.0);
        assert!(scale.log);
        assert_eq!(scale.labels(), ["2", "2.5", "3", "4", "5", "6", "8"]);
        assert!(scale.position(2.0) > 0.0 && scale.position(9.0) < 1.0);
        let wide = Scale::around([1e-3, 500.0].into_iter(), 20.0);
        assert_eq!(wide.labels(), ["1e-3", "0.01", "0.1", "1", "10", "100"]);
        assert!(!Scale::around([2.0, 2.1].into_iter(), 3.0).log);
    }

    #[test]
    fn nothing_to_show_is_still_an_axis() {
        for values in [
            vec![],
            vec![f64::NAN],
            vec![0.0],
            vec![5.0, 5.0],
            vec![-1.0, 0.0],
        ] {
            for scale in [
                Scale::around(values.iter().copied(), 3.0),
                Scale::from_zero(values.iter().copied()),
            ] {
                assert!(scale.high > scale.low, "{values:?} {scale:?}");
                assert!(
                    (2..=12).contains(&scale.ticks().len()),
                    "{values:?} {scale:?}"
                );
            }
        }
    }

    #[test]
    fn every_axis_has_few_ticks_inside_itself() {
        for low_exponent in -12..12 {
            for span in [1.001, 1.5, 4.0, 30.0, 1e3, 1e9] {
                let low = 1.7 * 10f64.powi(low_exponent);
                let scale = Scale::around([low, low * span].into_iter(), 3.0);
                let ticks = scale.ticks();
                assert!((2..=12).contains(&ticks.len()), "{scale:?} {ticks:?}");
                let inside = |tick: &f64| (-1e-6..=1.0 + 1e-6).contains(&scale.position(*tick));
                assert!(ticks.iter().all(inside), "{scale:?} {ticks:?}");
            }
        }
    }
}
