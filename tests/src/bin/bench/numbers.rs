//! Medians, spreads and ratios of what several rounds measured.

use serde::Serialize;

/// What several rounds gave.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Spread {
    /// The middle one; of an even number the mean of the two in the middle.
    pub median: f64,
    /// The smallest.
    pub min: f64,
    /// The largest.
    pub max: f64,
    /// How many there were.
    pub rounds: usize,
}

impl Spread {
    /// Of values; `None` of none.
    pub fn of(values: impl IntoIterator<Item = f64>) -> Option<Self> {
        let mut values: Vec<f64> = values
            .into_iter()
            .filter(|value| value.is_finite())
            .collect();
        values.sort_by(f64::total_cmp);
        let (min, max) = (*values.first()?, *values.last()?);
        let middle = values.len() / 2;
        let median = if values.len() % 2 == 1 {
            values[middle]
        } else {
            f64::midpoint(values[middle - 1], values[middle])
        };
        Some(Self {
            median,
            min,
            max,
            rounds: values.len(),
        })
    }
}

/// Ratios within each round (`above` by `below`, as pairs of round and value), then their spread:
/// so what slows a whole round down does not count.
pub fn ratio(above: &[(usize, f64)], below: &[(usize, f64)]) -> Option<Spread> {
    let ratios = above.iter().filter_map(|(round, value)| {
        let same = below.iter().find(|other| other.0 == *round)?;
        (same.1 > 0.0).then(|| value / same.1)
    });
    Spread::of(ratios)
}

/// A number for people: three digits that count.
pub fn short(value: f64) -> String {
    match value.abs() {
        size if size >= 100.0 => format!("{value:.0}"),
        size if size >= 10.0 => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    }
}

/// A rate with a decimal prefix: `1.23 G`.
pub fn prefixed(value: f64) -> String {
    for (factor, prefix) in [(1e9, "G"), (1e6, "M"), (1e3, "k")] {
        if value >= factor {
            return format!("{} {prefix}", short(value / factor));
        }
    }
    format!("{} ", short(value))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_in_the_middle() {
        let odd = Spread::of([3.0, 1.0, 2.0]).unwrap();
        assert_eq!(
            (odd.median, odd.min, odd.max, odd.rounds),
            (2.0, 1.0, 3.0, 3)
        );
        assert_eq!(Spread::of([4.0, 1.0]).unwrap().median, 2.5);
        assert_eq!(Spread::of([]), None);
        assert_eq!(Spread::of([f64::NAN]), None);
    }

    #[test]
    fn ratios_are_made_within_a_round() {
        // Round 2 was slow for both: their ratio is as in the others.
        let above = [(1, 10.0), (2, 1.0), (3, 12.0)];
        let below = [(1, 5.0), (2, 0.5), (3, 6.0)];
        let spread = ratio(&above, &below).unwrap();
        assert_eq!((spread.median, spread.min, spread.max), (2.0, 2.0, 2.0));
        // A round that one of them lacks does not count, nor one that gave nothing.
        assert_eq!(ratio(&above[..1], &below[1..]), None);
        assert_eq!(ratio(&above, &[(1, 0.0)]), None);
    }

    #[test]
    fn numbers_are_short() {
        assert_eq!(short(1234.4), "1234");
        assert_eq!(short(12.34), "12.3");
        assert_eq!(prefixed(1_230_000_000.0), "1.23 G");
        assert_eq!(prefixed(61_000.0), "61.0 k");
        assert_eq!(prefixed(7.0), "7.00 ");
    }
}
