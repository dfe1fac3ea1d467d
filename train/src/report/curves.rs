//! Curves of many steps as few points: buckets of equal numbers of steps, each with its mean, smallest and largest value.

use serde::Serialize;
use std::collections::BTreeMap;

/// The values of a curve that fall into one bucket.
#[derive(Clone, Copy, Debug)]
struct Bucket {
    n: u64,
    sum: f64,
    min: f64,
    max: f64,
}

const EMPTY: Bucket = Bucket { n: 0, sum: 0.0, min: f64::INFINITY, max: f64::NEG_INFINITY };

impl Bucket {
    fn value(self, of: f64) -> Option<f64> {
        (self.n > 0).then_some(of)
    }
}

/// Curves over the same steps, by name. Bucket `i` holds the steps from `i · width + 1` to `(i + 1) · width`, the same in all runs of a report, so that
/// runs can be averaged bucket by bucket.
#[derive(Clone, Debug)]
pub struct Curves {
    width: u64,
    columns: BTreeMap<String, Vec<Bucket>>,
}

/// A curve's points. What no step of a bucket has is null: a gap.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Points {
    /// Means.
    pub mean: Vec<Option<f64>>,
    /// The smallest values, where buckets hold more than a step.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub min: Vec<Option<f64>>,
    /// The largest.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub max: Vec<Option<f64>>,
}

impl Curves {
    /// For runs of up to `steps` steps, with about `points` points.
    pub fn new(steps: u64, points: u64) -> Curves {
        Curves { width: steps.div_ceil(points.max(1)).max(1), columns: BTreeMap::new() }
    }

    /// Adds a value at a step, from 1. What is not finite leaves its bucket as it is.
    pub fn add(&mut self, name: &str, step: u64, value: f64) {
        let at = (step.max(1) - 1) / self.width;
        if !value.is_finite() || at > 1 << 20 {
            return;
        }
        if !self.columns.contains_key(name) {
            self.columns.insert(name.to_string(), vec![]);
        }
        let Some(column) = self.columns.get_mut(name) else { return };
        if column.len() <= at as usize {
            column.resize(at as usize + 1, EMPTY);
        }
        let b = &mut column[at as usize];
        *b = Bucket { n: b.n + 1, sum: b.sum + value, min: b.min.min(value), max: b.max.max(value) };
    }

    /// Steps in a bucket.
    pub fn width(&self) -> u64 {
        self.width
    }

    /// The names of all curves.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.columns.keys().map(String::as_str)
    }

    /// A curve's means.
    pub fn mean(&self, name: &str) -> Vec<Option<f64>> {
        self.columns.get(name).map_or(vec![], |c| c.iter().map(|b| b.value(b.sum / b.n as f64)).collect())
    }

    /// A curve with the range of its values, where buckets hold more than a step.
    pub fn points(&self, name: &str) -> Points {
        let of = |part: fn(&Bucket) -> f64| match self.columns.get(name) {
            Some(c) if self.width > 1 => c.iter().map(|b| b.value(part(b))).collect(),
            _ => vec![],
        };
        Points { mean: self.mean(name), min: of(|b| b.min), max: of(|b| b.max) }
    }
}

/// The mean over runs of one variant with its standard error, point by point.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Spread {
    /// The mean where all runs have a value, else null: a run that ended early would make the mean jump.
    pub mean: Vec<Option<f64>>,
    /// The standard error of the mean (the sample's standard deviation over √n); null with fewer than two runs.
    pub stderr: Vec<Option<f64>>,
}

/// Averages curves on one grid.
pub fn spread(runs: &[Vec<Option<f64>>]) -> Spread {
    let longest = runs.iter().map(Vec::len).max().unwrap_or(0);
    let at = |i: usize| -> Option<Vec<f64>> { runs.iter().map(|r| r.get(i).copied().flatten()).collect() };
    let all: Vec<Option<Vec<f64>>> = (0..longest).map(at).collect();
    Spread { mean: all.iter().map(|v| v.as_deref().and_then(mean)).collect(), stderr: all.iter().map(|v| v.as_deref().and_then(stderr)).collect() }
}

fn mean(x: &[f64]) -> Option<f64> {
    (!x.is_empty()).then(|| x.iter().sum::<f64>() / x.len() as f64)
}

fn stderr(x: &[f64]) -> Option<f64> {
    let (m, n) = (mean(x)?, x.len() as f64);
    (x.len() > 1).then(|| (x.iter().map(|v| (v - m).powi(2)).sum::<f64>() / (n - 1.0) / n).sqrt())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_spike_survives_in_the_range() {
        let mut c = Curves::new(10_000, 100);
        for step in 1..=10_000u64 {
            c.add("loss", step, if step == 5_050 { 9.0 } else { 1.0 });
        }
        let p = c.points("loss");
        assert_eq!((c.width(), p.mean.len(), p.min.len()), (100, 100, 100));
        // steps 5001 to 5100
        assert_eq!((p.mean[50], p.min[50], p.max[50]), (Some(1.08), Some(1.0), Some(9.0)));
        assert!((0..100).filter(|i| *i != 50).all(|i| p.mean[i] == Some(1.0) && p.max[i] == Some(1.0)));
    }

    #[test]
    fn short_runs_stay_as_they_are() {
        let mut c = Curves::new(3, 400);
        c.add("loss", 1, 4.0);
        c.add("loss", 3, 2.0);
        c.add("loss", 2, f64::NAN);
        assert_eq!(c.points("loss"), Points { mean: vec![Some(4.0), None, Some(2.0)], min: vec![], max: vec![] });
        assert_eq!(c.points("nothing").mean, []);
        // a step that no run has is no reason to take memory for all before it
        c.add("loss", u64::MAX, 1.0);
        assert_eq!(c.mean("loss").len(), 3);
    }

    #[test]
    fn means_stand_where_all_runs_do() {
        let s = spread(&[vec![Some(1.0), Some(2.0), None], vec![Some(3.0), None], vec![Some(5.0), Some(1.0), Some(1.0)]]);
        assert_eq!(s.mean, [Some(3.0), None, None]);
        // deviations −2, 0, 2: variance 4, over 3
        assert!((s.stderr[0].unwrap() - (4.0f64 / 3.0).sqrt()).abs() < 1e-12);
        assert_eq!(spread(&[vec![Some(1.0)]]), Spread { mean: vec![Some(1.0)], stderr: vec![None] });
        assert_eq!(spread(&[]).mean, []);
    }
}
