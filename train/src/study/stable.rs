//! The largest learning rate that the variants of a sweep bear.

use super::arm::State;
use super::results::{ArmResult, Results, VariantResult};
use crate::measure::{Trial, max_stable_lr};
use serde::{Deserialize, Serialize};

/// The largest learning rate that a variant was stable at, by [`max_stable_lr`](crate::measure::max_stable_lr) over the arms that came to an end.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Stable {
    /// The variant in the study's file.
    pub variant: String,
    /// The largest rate that is stable, as are the smaller ones that were tried. None where there is none.
    pub lr: Option<f64>,
    /// The smallest that is not: none where all that were tried are stable.
    #[serde(default)]
    pub unstable: Option<f64>,
    /// Rates below that one with arms that are not at their end yet.
    #[serde(default)]
    pub pending: Vec<f64>,
}

/// Of the arms that came to an end; none where none did.
pub(super) fn stable(name: &str, variants: &[VariantResult], vocab: usize) -> Option<Stable> {
    let arms: Vec<(f64, &ArmResult)> = variants
        .iter()
        .filter(|v| v.of == name)
        .filter_map(|v| Some((v.value?, v)))
        .flat_map(|(lr, v)| v.arms.iter().map(move |a| (lr, a)))
        .collect();
    let ended = |a: &ArmResult| matches!(a.state, State::Done | State::Diverged);
    let trial = |(lr, a): &(f64, &ArmResult)| {
        let value = |key: &str| a.values.get(key).copied();
        Trial { lr: *lr, seed: a.seed, diverged: a.state == State::Diverged, rise: value("rise"), end: value("train_loss") }
    };
    let trials: Vec<Trial> = arms.iter().filter(|(_, a)| ended(a)).map(trial).collect();
    if trials.is_empty() {
        return None;
    }
    let found = max_stable_lr(&trials, (vocab as f64).ln());
    let mut pending: Vec<f64> = arms.iter().filter(|(lr, a)| !ended(a) && found.unstable.is_none_or(|u| *lr < u)).map(|(lr, _)| *lr).collect();
    pending.sort_by(f64::total_cmp);
    pending.dedup();
    Some(Stable { variant: name.to_string(), lr: found.largest, unstable: found.unstable, pending })
}

impl Stable {
    /// In words, and what is to be added: `0.128 or more`, `the sweep's largest`; or `at least 0.002 so far`, `0.008 to 0.128 not trained yet`.
    pub fn words(&self, study: &Results) -> (String, Option<String>) {
        if self.pending.is_empty() {
            return match (self.lr, self.unstable) {
                (Some(lr), Some(_)) => (lr.to_string(), None),
                (Some(lr), None) => (format!("{lr} or more"), Some("the sweep's largest".into())),
                (None, u) => (format!("below {}", u.unwrap_or_default()), None),
            };
        }
        let bounds = [self.lr.map(|lr| format!("at least {lr}")), self.unstable.map(|u| format!("below {u}"))];
        let known = bounds.into_iter().flatten().collect::<Vec<_>>().join(", ");
        let values = study.sweep.as_ref().map_or(&[][..], |s| &s.values[..]);
        let trained = if study.seeds.len() > 1 { "trained with all seeds" } else { "trained" };
        (format!("{known} so far"), Some(format!("{} not {trained} yet", self.listed(values))))
    }

    /// The rates that are pending: from the first to the last, if none of the sweep's between them is left out.
    fn listed(&self, values: &[f64]) -> String {
        let p = &self.pending;
        match &p[..] {
            [first, .., last] if p.len() > 2 && values.windows(p.len()).any(|w| w == p) => format!("{first} to {last}"),
            _ => p.iter().map(f64::to_string).collect::<Vec<_>>().join(", "),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    const RATES: [f64; 4] = [0.002, 0.008, 0.032, 0.128];

    /// A study of one variant: for each rate its arms, `None` where one is not at its end, else where it ended, nats.
    fn study(arms: [&[Option<f64>]; 4]) -> Results {
        let arm = |(i, end): (usize, &Option<f64>)| ArmResult {
            seed: i as u64,
            run: String::new(),
            state: if end.is_some() { State::Done } else { State::Pending },
            step: 0,
            values: end.map(|e| BTreeMap::from([("train_loss".to_string(), e), ("rise".to_string(), 0.0)])).unwrap_or_default(),
        };
        let variant = |(lr, arms): (f64, &[Option<f64>])| VariantResult {
            name: format!("a@{lr}"),
            of: "a".into(),
            about: String::new(),
            value: Some(lr),
            baseline: format!("a@{lr}"),
            set: serde_json::Value::Null,
            parameters: 0,
            active_parameters: 0,
            added_parameters: 0,
            arms: arms.iter().enumerate().map(arm).collect(),
            summary: BTreeMap::new(),
        };
        let variants: Vec<VariantResult> = RATES.into_iter().zip(arms).map(variant).collect();
        let largest_stable = stable("a", &variants, 256).into_iter().collect();
        let seeds = (0..arms[0].len() as u64).collect();
        let sweep = Some(super::super::SweepResult { key: "optim.lr".into(), values: RATES.into(), largest_stable });
        Results {
            format: 1,
            name: "s".into(),
            title: String::new(),
            about: String::new(),
            baseline: "a".into(),
            seeds,
            columns: vec![],
            variants,
            sweep,
            paper: None,
        }
    }

    #[test]
    fn what_is_known_of_a_sweep_is_said() {
        let (good, bad, none) = (&[Some(2.0)][..], &[Some(3.0)][..], &[None][..]);
        let worst = &[Some(9.0)][..];
        let two = &[Some(2.0), None][..];
        for (arms, line) in [
            ([good, good, bad, bad], "| a | 0.008 |"),
            ([good, good, good, good], "| a | 0.128 or more (the sweep's largest) |"),
            ([worst, bad, bad, bad], "| a | below 0.002 |"),
            ([good, none, none, none], "| a | at least 0.002 so far; 0.008 to 0.128 not trained yet |"),
            ([good, none, bad, none], "| a | at least 0.002, below 0.032 so far; 0.008 not trained yet |"),
            ([none, good, none, none], "| a | at least 0.008 so far; 0.002, 0.032, 0.128 not trained yet |"),
            ([none, none, worst, none], "| a | below 0.032 so far; 0.002, 0.008 not trained yet |"),
            // what lies above an unstable rate is no matter
            ([good, bad, none, none], "| a | 0.002 |"),
            ([two, two, two, two], "| a | at least 0.128 so far; 0.002 to 0.128 not trained with all seeds yet |"),
        ] {
            let table = study(arms).markdown();
            assert!(table.contains(&format!("{line}\n")), "{line}: {table}");
        }
        assert!(!study([none; 4]).markdown().contains("largest stable"));
    }
}
