//! Preparing a series for the page: smoothing it, and thinning it to what a screen can show.

/// A series of (x, y) with rising x; y may be NaN where there is no value.
pub(super) type Series = Vec<(f64, f64)>;

/// Columns of the plot that a thinned series may fill. More would not be seen.
const COLUMNS: usize = 800;

/// Steps on both sides that the smoothed curve of a series of `steps` steps looks at; 0 when the
/// series is too short to smooth.
pub(super) fn smoothing_reach(steps: usize) -> usize {
    if steps < 20 {
        0
    } else {
        (steps / 100).clamp(2, 500)
    }
}

/// The centred moving mean over `reach` steps to both sides, without lag. Missing values are left
/// out of the mean. At the start the window shrinks on both sides alike, so that the steep slope
/// there does not bend; at the end it keeps its left side, so that the curve does not end in noise.
pub(super) fn smoothed(series: &[(f64, f64)], reach: usize) -> Series {
    // Prefix sums of the values present, and how many there are.
    let mut sums = Vec::with_capacity(series.len() + 1);
    sums.push((0.0, 0usize));
    let (mut sum, mut count) = (0.0, 0);
    for (_, y) in series {
        if y.is_finite() {
            sum += y;
            count += 1;
        }
        sums.push((sum, count));
    }
    let mean = |index: usize| {
        let left = reach.min(index);
        let right = left.min(series.len() - 1 - index);
        let (from, to) = (sums[index - left], sums[index + right + 1]);
        (to.0 - from.0) / (to.1 - from.1) as f64
    };
    series
        .iter()
        .enumerate()
        .map(|(index, (x, _))| (*x, mean(index)))
        .collect()
}

/// At most two points per column of the plot: its lowest and its highest value in the order in
/// which they came, so that no spike is lost. A column with a missing value keeps one, which
/// breaks the line there.
pub(super) fn thinned(series: &[(f64, f64)], high: f64) -> Series {
    if series.len() <= 2 * COLUMNS {
        return series.to_vec();
    }
    let column = |x: f64| (x / high * COLUMNS as f64) as usize;
    let mut thin = Series::with_capacity(2 * COLUMNS);
    for points in series.chunk_by(|a, b| column(a.0) == column(b.0)) {
        let mut kept: Series = Vec::with_capacity(3);
        let finite = || points.iter().filter(|(_, y)| y.is_finite());
        kept.extend(finite().min_by(|a, b| a.1.total_cmp(&b.1)));
        kept.extend(finite().max_by(|a, b| a.1.total_cmp(&b.1)));
        kept.extend(points.iter().find(|(_, y)| !y.is_finite()));
        kept.sort_by(|a, b| a.0.total_cmp(&b.0));
        kept.dedup_by(|a, b| a.0 == b.0);
        thin.append(&mut kept);
    }
    thin
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_straight_line_stays_straight_until_the_window_meets_the_end() {
        let line: Series = (0..50)
            .map(|x| (f64::from(x), 3.0 * f64::from(x)))
            .collect();
        let smooth = smoothed(&line, 7);
        assert_eq!(smooth[..43], line[..43]);
        assert_eq!(smooth[49], (49.0, 3.0 * 45.5), "the mean of steps 42 to 49");
        assert_eq!(smoothed(&line[..1], 7), line[..1]);
        assert!(smoothed(&[], 7).is_empty());
    }

    #[test]
    fn missing_values_are_left_out_of_the_mean() {
        let series = [(0.0, 1.0), (1.0, f64::NAN), (2.0, 3.0)];
        assert_eq!(smoothed(&series, 1)[1], (1.0, 2.0));
        assert!(smoothed(&series, 0)[1].1.is_nan());
    }

    #[test]
    fn thinning_keeps_spikes_and_gaps() {
        let mut series: Series = (0..100_000).map(|x| (f64::from(x), 1.0)).collect();
        series[54_321].1 = 99.0;
        series[77_777].1 = -5.0;
        series[88_888].1 = f64::NAN;
        let thin = thinned(&series, 100_000.0);
        assert!(thin.len() <= 3 * COLUMNS, "{}", thin.len());
        assert!(thin.contains(&(54_321.0, 99.0)) && thin.contains(&(77_777.0, -5.0)));
        assert_eq!(thin.iter().filter(|(_, y)| y.is_nan()).count(), 1);
        assert!(thin.windows(2).all(|pair| pair[0].0 < pair[1].0));
    }
}
