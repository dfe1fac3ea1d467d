//! `results.json`: a study's arms, and what they come to over seeds.

use super::arm::{Outcome, State};
use super::file::{Paper, VariantFile};
use super::plan::{Arm, Plan, Variant};
use super::stable::{Stable, stable};
use crate::{Error, Result};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::Path;

/// Its name in a study's folder.
pub const FILE: &str = "results.json";
/// The version of the format.
pub const FORMAT: u32 = 1;

/// A study's results.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Results {
    /// Version of the format.
    pub format: u32,
    /// The study.
    pub name: String,
    /// Its heading.
    #[serde(default)]
    pub title: String,
    /// What it asks.
    #[serde(default)]
    pub about: String,
    /// The variant that others are held against.
    #[serde(default)]
    pub baseline: String,
    /// Seeds.
    #[serde(default)]
    pub seeds: Vec<u64>,
    /// The table's columns.
    pub columns: Vec<Column>,
    /// What was trained.
    pub variants: Vec<VariantResult>,
    /// Where values of a key were gone through.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sweep: Option<SweepResult>,
    /// The paper's figures.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub paper: Option<Paper>,
}

/// A column.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Column {
    /// The scalar's name.
    pub key: String,
    /// Its heading.
    pub label: String,
    /// `lower` or `higher`, where one of them is better.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub better: Option<String>,
}

/// A variant.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct VariantResult {
    /// Its name.
    pub name: String,
    /// Its name in the study's file: without a sweep's value.
    #[serde(default)]
    pub of: String,
    /// In words.
    #[serde(default)]
    pub about: String,
    /// The sweep's value.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub value: Option<f64>,
    /// What it is held against.
    #[serde(default)]
    pub baseline: String,
    /// What it sets.
    #[serde(default)]
    pub set: Value,
    /// Parameters.
    #[serde(default)]
    pub parameters: usize,
    /// Those that act on one token.
    #[serde(default)]
    pub active_parameters: usize,
    /// More than the baseline's.
    #[serde(default)]
    pub added_parameters: i64,
    /// One for each seed.
    #[serde(default)]
    pub arms: Vec<ArmResult>,
    /// Over the arms that are done, by scalar.
    #[serde(default)]
    pub summary: BTreeMap<String, Summary>,
}

/// An arm.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ArmResult {
    /// Its seed.
    pub seed: u64,
    /// Its run folder, relative to the study's.
    pub run: String,
    /// How far it is.
    pub state: State,
    /// Steps done.
    #[serde(default)]
    pub step: u64,
    /// Scalars.
    #[serde(default)]
    pub values: BTreeMap<String, f64>,
}

/// A mean over seeds.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Estimate {
    /// Mean.
    pub mean: f64,
    /// Standard error: the sample's standard deviation by √n; none of one seed.
    pub stderr: Option<f64>,
    /// Seeds.
    pub n: usize,
}

/// A scalar over seeds.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Summary {
    /// Itself.
    #[serde(flatten)]
    pub own: Estimate,
    /// Less the baseline's with the same seed, over the seeds that both have.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub difference: Option<Estimate>,
}

/// What a sweep comes to.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SweepResult {
    /// The key.
    pub key: String,
    /// Its values.
    pub values: Vec<f64>,
    /// Of each variant in the study's file, where the key is the learning rate.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub largest_stable: Vec<Stable>,
}

/// Mean and standard error.
pub(super) fn estimate(x: &[f64]) -> Option<Estimate> {
    let n = x.len();
    if n == 0 {
        return None;
    }
    let mean = x.iter().sum::<f64>() / n as f64;
    let stderr = (n > 1).then(|| (x.iter().map(|y| (y - mean).powi(2)).sum::<f64>() / (n - 1) as f64 / n as f64).sqrt());
    Some(Estimate { mean, stderr, n })
}

impl Results {
    /// Of what is there of each arm.
    pub(super) fn new(plan: &Plan, outcomes: &[(Arm, Outcome)]) -> Results {
        let of = |i: usize| outcomes.iter().filter(move |(a, _)| a.variant == i);
        let arm = |(a, o): &(Arm, Outcome)| ArmResult {
            seed: a.seed,
            run: a.folder.display().to_string(),
            state: o.state,
            step: o.step,
            values: o.values.clone(),
        };
        let mut variants: Vec<VariantResult> =
            plan.variants.iter().enumerate().filter_map(|(i, v)| Some(variant(v, &of(i).next()?.0, of(i).map(arm).collect()))).collect();
        let by_name: BTreeMap<String, VariantResult> = variants.iter().map(|v| (v.name.clone(), v.clone())).collect();
        for v in &mut variants {
            let Some(base) = by_name.get(&v.baseline) else { continue };
            v.added_parameters = v.parameters as i64 - base.parameters as i64;
            if base.name == v.name {
                continue;
            }
            for (key, s) in &mut v.summary {
                let pair = |a: &ArmResult| Some(done(a)?.get(key)? - base.arms.iter().find(|b| b.seed == a.seed).and_then(done)?.get(key)?);
                s.difference = estimate(&v.arms.iter().filter_map(pair).collect::<Vec<_>>());
            }
        }
        let vocab = |name: &str| {
            let first = outcomes.iter().find(|(a, _)| plan.variant(a).of == name);
            first.map_or(0, |(a, _)| a.resolved.config.model.vocab_size)
        };
        let largest = |v: &VariantFile| stable(&v.name, &variants, vocab(&v.name));
        let sweep = plan.file.sweep.as_ref().map(|s| SweepResult {
            key: s.key.clone(),
            values: s.values.clone(),
            largest_stable: if s.key == "optim.lr" { plan.file.variant.iter().filter_map(largest).collect() } else { vec![] },
        });
        let columns = plan.file.columns.iter().map(|c| Column { key: c.key.clone(), label: c.label.clone(), better: c.better.clone() });
        Results {
            format: FORMAT,
            name: plan.name.clone(),
            title: plan.file.title.clone(),
            about: plan.file.about.clone(),
            baseline: plan.file.baseline.clone(),
            seeds: plan.file.seeds.clone(),
            columns: columns.collect(),
            variants,
            sweep,
            paper: plan.file.paper.clone(),
        }
    }

    /// Reads a `results.json`.
    pub fn read(path: &Path) -> Result<Results> {
        let text = std::fs::read(path).map_err(Error::io("reading", path))?;
        let wrong = |why: String| Error::Usage(format!("{}: {why}", path.display()));
        let value: Value =
            serde_json::from_slice(&text).map_err(|e| wrong(format!("is no JSON: {e}; the same `tidegate study` again writes it anew")))?;
        if value["format"] != FORMAT {
            let found = value["format"].as_u64().map_or("none".into(), |f| f.to_string());
            return Err(wrong(format!("its format is {found}, and this tidegate reads {FORMAT}; use the tidegate that wrote it")));
        }
        let r: Results = serde_json::from_value(value).map_err(|e| wrong(format!("is no study's results: {e}")))?;
        let twice = r.variants.iter().enumerate().find(|(i, v)| r.variants[..*i].iter().any(|w| w.name == v.name));
        match twice {
            Some((_, v)) => Err(wrong(format!("two variants are called `{}`", v.name))),
            None => Ok(r),
        }
    }

    /// Writes it as a whole.
    pub fn write(&self, path: &Path) -> Result<()> {
        let text = serde_json::to_string_pretty(self).map_err(|e| Error::Model(format!("{}: {e}", path.display())))?;
        crate::checkpoint::write(path, format!("{text}\n").as_bytes())
    }
}

/// The scalars of an arm that is done.
fn done(a: &ArmResult) -> Option<&BTreeMap<String, f64>> {
    (a.state == State::Done).then_some(&a.values)
}

fn variant(v: &Variant, first: &Arm, arms: Vec<ArmResult>) -> VariantResult {
    let mut all: BTreeMap<&String, Vec<f64>> = BTreeMap::new();
    for (key, x) in arms.iter().filter_map(done).flatten() {
        all.entry(key).or_default().push(*x);
    }
    let summary = all.into_iter().filter_map(|(k, x)| Some((k.clone(), Summary { own: estimate(&x)?, difference: None }))).collect();
    let (parameters, active_parameters) = first.resolved.config.model.parameters();
    VariantResult {
        name: v.name.clone(),
        of: v.of.clone(),
        about: v.about.clone(),
        value: v.value,
        baseline: v.baseline.clone(),
        set: serde_json::to_value(&v.set).unwrap_or_default(),
        parameters,
        active_parameters,
        added_parameters: 0,
        arms,
        summary,
    }
}
