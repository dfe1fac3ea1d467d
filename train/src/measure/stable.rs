//! The largest learning rate of a sweep that training bears.

/// Nats that the mean loss of a tenth of a run may lie above the lowest before it. On text, runs at sensible rates stay below 0.1, those of a few dozen steps
/// below 0.2.
pub const RISE: f64 = 0.25;
/// Nats that a run may end above one with a smaller rate. In Table 2 of 2505.06708, the rate that is too large costs 0.21 nats; the same rate with a gate 0.005.
pub const WORSE: f64 = 0.1;

/// How far a run's loss climbed: the most that the mean of as many consecutive losses as are a tenth of the run lies above the lowest before them. That is the
/// first loss, or the mean of as many that end where these begin, or earlier. Around 0 or less of a loss that falls.
pub fn rise(losses: &[f64]) -> Option<f64> {
    let mut lowest = *losses.first()?;
    let tenth = losses.len().div_ceil(10);
    let means: Vec<f64> = losses.windows(tenth).map(|w| w.iter().sum::<f64>() / tenth as f64).collect();
    let mut most = f64::NEG_INFINITY;
    for (i, mean) in means.iter().enumerate() {
        if i >= tenth {
            lowest = lowest.min(means[i - tenth]);
        }
        most = most.max(mean - lowest);
    }
    Some(most)
}

/// One run of a sweep over learning rates, at its end.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Trial {
    /// The peak learning rate.
    pub lr: f64,
    /// Its seed: it is held against runs with the same.
    pub seed: u64,
    /// Whether its numbers stopped being finite.
    pub diverged: bool,
    /// Its [`rise`].
    pub rise: Option<f64>,
    /// Its training loss at the end, nats: the mean of the last tenth.
    pub end: Option<f64>,
}

/// Between which of a sweep's learning rates training stops to bear them.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StableLr {
    /// The largest that is stable, as are all smaller ones in the sweep. None where the smallest is not.
    pub largest: Option<f64>,
    /// The smallest that is not.
    pub unstable: Option<f64>,
}

/// The largest learning rate of a sweep that is stable, as are all smaller ones in it. A rate is unstable if one of its runs
///
/// - stopped being finite,
/// - or rose by more than [`RISE`] nats: it blew up, whether or not it came back,
/// - or ended more than [`WORSE`] nats above the run with the same seed at some smaller rate, or above `uniform`, the loss of a uniform guess, ln V.
///
/// Loss spikes don't count: what goes away within a few steps moves no mean over a tenth of a run by much, and what doesn't is a rise.
pub fn max_stable_lr(sweep: &[Trial], uniform: f64) -> StableLr {
    let bears = |t: &&Trial| {
        let smaller = sweep.iter().filter(|s| s.seed == t.seed && s.lr < t.lr).filter_map(|s| s.end);
        let best = smaller.fold(uniform, f64::min);
        !t.diverged && t.rise.is_none_or(|r| r <= RISE) && t.end.is_none_or(|e| e <= best + WORSE)
    };
    let unstable = sweep.iter().filter(|t| !bears(t)).map(|t| t.lr).reduce(f64::min);
    let largest = sweep.iter().map(|t| t.lr).filter(|lr| unstable.is_none_or(|u| *lr < u)).reduce(f64::max);
    StableLr { largest, unstable }
}

#[cfg(test)]
mod tests {
    use super::*;

    const UNIFORM: f64 = 5.545;

    /// Twenty losses around each of the means of ten tenths, behind a first loss.
    fn run(first: f64, tenths: [f64; 10]) -> Vec<f64> {
        let mut x: Vec<f64> = tenths.iter().flat_map(|m| (0..20).map(move |i| m + if i % 2 == 0 { 0.05 } else { -0.05 })).collect();
        x[0] = first;
        x
    }
    fn trial(lr: f64, losses: &[f64]) -> Trial {
        let tail = &losses[losses.len() - losses.len().div_ceil(10)..];
        let end = (!tail.is_empty()).then(|| tail.iter().sum::<f64>() / tail.len() as f64);
        Trial { lr, seed: 1, diverged: false, rise: rise(losses), end }
    }
    const GOOD: [f64; 10] = [4.0, 3.0, 2.6, 2.3, 2.1, 1.95, 1.85, 1.75, 1.7, 1.65];

    #[test]
    fn rises_by_hand() {
        assert_eq!(rise(&[]), None);
        assert_eq!(rise(&[2.0]), Some(0.0));
        // tenths are single losses here: 1 is the lowest before 4
        assert_eq!(rise(&[5.0, 3.0, 1.0, 2.0, 4.0, 2.0]), Some(3.0));
        // it may be where no block of a tenth begins: with 20, the mean of two, 9 above the 1s
        let mut x = vec![1.0; 20];
        (x[11], x[12]) = (10.0, 10.0);
        assert_eq!(rise(&x), Some(9.0));
        // falling all the way: no more than from the first loss to the first mean
        let falls: Vec<f64> = (0..100).map(|i| 5.0 - 0.01 * f64::from(i)).collect();
        assert!((rise(&falls).unwrap() + 0.045).abs() < 1e-12, "{:?}", rise(&falls));
    }

    #[test]
    fn what_is_stable() {
        let good = trial(0.002, &run(5.5, GOOD));
        let of = |losses: &[f64]| max_stable_lr(&[good, trial(0.5, losses)], UNIFORM);
        let stable = StableLr { largest: Some(0.5), unstable: None };
        let unstable = StableLr { largest: Some(0.002), unstable: Some(0.5) };
        assert_eq!(of(&run(5.5, GOOD)), stable);
        // 12 layers at a rate of 0.5: it ends below its first tenth, and was wrecked
        assert_eq!(of(&run(5.56, [9.8, 15.6, 26.2, 20.0, 14.0, 9.0, 6.5, 5.0, 4.0, 3.53])), unstable);
        // a rate of 3: it falls all the way, to far above a uniform guess
        let high = run(5.56, [90.0, 70.0, 60.0, 50.0, 40.0, 33.0, 27.0, 23.0, 19.0, 16.1]);
        assert_eq!(of(&high), unstable);
        assert_eq!(max_stable_lr(&[trial(3.0, &high)], UNIFORM), StableLr { largest: None, unstable: Some(3.0) });
        // the blow-up is over within the first tenth, and hidden in its mean; where it ends tells
        let mut hidden = run(4.94, [4.2, 4.1, 3.9, 3.8, 3.6, 3.5, 3.4, 3.3, 3.25, 3.2]);
        hidden[2..6].fill(7.88);
        assert!(rise(&hidden).unwrap() < RISE && of(&hidden) == unstable);
        // nothing ever rises: it is stuck
        assert_eq!(of(&run(5.5, [4.0, 3.1, 3.1, 3.1, 3.1, 3.1, 3.1, 3.1, 3.1, 3.1])), unstable);
        // in the middle, and back to what the others come to
        assert_eq!(of(&run(5.5, [4.0, 3.0, 2.6, 6.0, 3.5, 2.4, 2.0, 1.8, 1.7, 1.65])), unstable);
        // up at the end, as before
        assert_eq!(of(&run(5.5, [4.0, 3.0, 2.6, 2.3, 2.1, 1.9, 1.8, 1.8, 2.0, 2.4])), unstable);
        // a spike of two steps that goes away is none of it
        let mut spiked = run(5.5, GOOD);
        spiked[120..122].fill(4.0);
        assert_eq!(of(&spiked), stable);
        // not finite, whatever the losses before say
        let diverged = Trial { diverged: true, ..trial(0.5, &run(5.5, GOOD)) };
        assert_eq!(max_stable_lr(&[good, diverged], UNIFORM), unstable);
    }

    #[test]
    fn bounds_of_both_kinds() {
        let with = |lr: f64, rise: f64, end: f64| Trial { lr, seed: 1, diverged: false, rise: Some(rise), end: Some(end) };
        let largest = |sweep: &[Trial]| max_stable_lr(sweep, UNIFORM).largest;
        assert_eq!(largest(&[with(1.0, 0.25, 2.0), with(2.0, 0.26, 2.0)]), Some(1.0));
        assert_eq!(largest(&[with(1.0, 0.0, 2.0), with(2.0, 0.0, 2.09), with(3.0, 0.0, 2.11)]), Some(2.0));
        // worse than a smaller rate, not than the next smaller one, and not than a larger one
        assert_eq!(largest(&[with(1.0, 0.0, 2.0), with(2.0, 0.0, 2.09), with(3.0, 0.0, 2.18)]), Some(2.0));
        assert_eq!(largest(&[with(1.0, 0.0, 3.0), with(2.0, 0.0, 2.0)]), Some(2.0));
        // Table 2 of the paper, 48 layers: 4e-3, 8e-3 and the latter with a gate
        assert_eq!(largest(&[with(4e-3, 0.0, 7.421f64.ln()), with(8e-3, 0.0, 9.195f64.ln())]), Some(4e-3));
        assert_eq!(largest(&[with(4e-3, 0.0, 7.288f64.ln()), with(8e-3, 0.0, 7.325f64.ln())]), Some(8e-3));
        // seeds are held against themselves; one that fails is enough; and a rate above one that fails doesn't count
        let seed = |t: Trial, seed: u64| Trial { seed, ..t };
        assert_eq!(largest(&[with(1.0, 0.0, 2.0), seed(with(2.0, 0.0, 2.2), 2), seed(with(1.0, 0.0, 2.15), 2)]), Some(2.0));
        assert_eq!(largest(&[with(1.0, 0.0, 2.0), with(2.0, 0.0, 2.0), seed(with(2.0, 0.3, 2.0), 2), with(4.0, 0.0, 2.0)]), Some(1.0));
        assert_eq!(max_stable_lr(&[], UNIFORM), StableLr { largest: None, unstable: None });
    }
}
