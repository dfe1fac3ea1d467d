//! The learning rate as a function of progress through the budget.

use serde::{Deserialize, Serialize};

/// The shape of the learning rate after warm-up. Progress `p` is in [0, 1] of the run's budget, whatever the budget's unit is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Shape {
    /// Half a cosine from the peak down to the final value (Loshchilov & Hutter 2017, SGDR, eq. 5).
    #[default]
    Cosine,
    /// Warm-up, stable, decay: the peak until `1 - decay`, then a straight line (Hu et al. 2024, MiniCPM, §4).
    Wsd,
    /// A straight line from the end of warm-up.
    Linear,
    /// The peak throughout.
    Constant,
}

/// A schedule: the factor on the peak learning rate.
#[derive(Clone, Copy, Debug)]
pub struct Schedule {
    /// The shape after warm-up.
    pub shape: Shape,
    /// The part of the budget that warms up, from 0 to the peak.
    pub warmup: f64,
    /// The part of the budget that decays, for [`Shape::Wsd`].
    pub decay: f64,
    /// The factor at the end.
    pub end: f64,
}

impl Schedule {
    /// The factor at progress `p`.
    pub fn factor(&self, p: f64) -> f64 {
        let p = p.clamp(0.0, 1.0);
        if p < self.warmup {
            return p / self.warmup;
        }
        let rest = |from: f64| if from >= 1.0 { 1.0 } else { ((p - from) / (1.0 - from)).clamp(0.0, 1.0) };
        let falling = |t: f64| 1.0 + (self.end - 1.0) * t;
        match self.shape {
            Shape::Constant => 1.0,
            Shape::Linear => falling(rest(self.warmup)),
            Shape::Wsd => falling(if p <= 1.0 - self.decay { 0.0 } else { rest((1.0 - self.decay).max(self.warmup)) }),
            Shape::Cosine => self.end + (1.0 - self.end) * 0.5 * (1.0 + (std::f64::consts::PI * rest(self.warmup)).cos()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shapes() {
        let at = |shape, p: f64| Schedule { shape, warmup: 0.1, decay: 0.2, end: 0.05 }.factor(p);
        for shape in [Shape::Cosine, Shape::Wsd, Shape::Linear, Shape::Constant] {
            assert_eq!(at(shape, 0.0), 0.0);
            assert!((at(shape, 0.05) - 0.5).abs() < 1e-12);
            assert!((at(shape, 0.1) - 1.0).abs() < 1e-12);
            let end = if shape == Shape::Constant { 1.0 } else { 0.05 };
            assert!((at(shape, 1.0) - end).abs() < 1e-12);
            assert_eq!(at(shape, 1.0), at(shape, 7.0));
            let mut last = 1.0;
            for i in 10..=100 {
                let f = at(shape, f64::from(i) / 100.0);
                assert!(f <= last + 1e-12);
                last = f;
            }
        }
        assert!((at(Shape::Cosine, 0.55) - 0.525).abs() < 1e-12);
        assert!((at(Shape::Linear, 0.55) - 0.525).abs() < 1e-12);
        assert_eq!(at(Shape::Wsd, 0.79), 1.0);
        assert!((at(Shape::Wsd, 0.9) - 0.525).abs() < 1e-12);
        let none = Schedule { shape: Shape::Wsd, warmup: 0.0, decay: 1.0, end: 0.0 };
        assert_eq!((none.factor(0.0), none.factor(0.5), none.factor(1.0)), (1.0, 0.5, 0.0));
    }
}
