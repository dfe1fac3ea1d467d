//! What a study trains: its variants with all values of the sweep, each with each seed.

use super::columns;
use super::file::{StudyFile, VariantFile};
use crate::config::{Layers, Resolved};
use crate::{Error, Result, presets};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

/// A variant as it is trained; one of a sweep has the value in its name.
#[derive(Clone, Debug)]
pub struct Variant {
    /// `NAME`, or `NAME@VALUE`.
    pub name: String,
    /// The name in the study's file.
    pub of: String,
    /// In words.
    pub about: String,
    /// The sweep's value.
    pub value: Option<f64>,
    /// What it is held against.
    pub baseline: String,
    /// What it sets.
    pub set: toml::Table,
}

/// A variant with a seed.
#[derive(Clone, Debug)]
pub struct Arm {
    /// Of [`Plan::variants`].
    pub variant: usize,
    /// Seed.
    pub seed: u64,
    /// Its run folder, in the study's.
    pub folder: PathBuf,
    /// Its configuration.
    pub resolved: Resolved,
}

/// A study that can be run.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The study's name.
    pub name: String,
    /// Its file.
    pub file: StudyFile,
    /// What is trained.
    pub variants: Vec<Variant>,
    /// In the order in which they are trained: all variants with the first seed, then with the next.
    pub arms: Vec<Arm>,
}

impl Plan {
    /// Checks each arm's configuration before the first is trained. `set` is `--set`s, on top of the study's own.
    pub fn new(name: &str, file: StudyFile, set: &[String]) -> Result<Plan> {
        let variants = variants(&file);
        let swept = file.sweep.as_ref().map(|s| s.key.as_str());
        // what the study gives each arm itself, on top of all else
        let given = |key: &str| ["seed", "name"].contains(&key) || swept.is_some_and(|k| meets(k, key));
        for s in set {
            let key = s.split('=').next().unwrap_or_default().trim();
            if given(key) {
                return Err(Error::Usage(format!("--set {s}: study {name} itself goes through values of `{key}`")));
            }
            if let Some(v) = file.variant.iter().find(|v| keys(&v.set).iter().any(|k| meets(k, key))) {
                return Err(Error::Usage(format!("--set {s}: variant `{}` of study {name} sets that itself", v.name)));
            }
        }
        let tables = file.variant.iter().map(|v| (format!("variant `{}`", v.name), &v.set)).chain([("[set]".to_string(), &file.set)]);
        for (whose, table) in tables {
            if let Some(key) = keys(table).into_iter().find(|k| given(k)) {
                return Err(Error::Usage(format!(
                    "study {name}, {whose}: `{key}` is set, and the study itself goes through values of it; leave it out"
                )));
            }
        }
        if let Some(key) = swept.filter(|k| ["seed", "name"].contains(k)) {
            return Err(Error::Usage(format!("study {name}: a sweep can't go through values of `{key}`; name seeds in `seeds`")));
        }
        let (mut arms, mut known) = (vec![], BTreeSet::new());
        for &seed in &file.seeds {
            for (i, v) in variants.iter().enumerate() {
                let wrong = |e: Error| Error::Usage(format!("study {name}, variant `{}`, seed {seed}: {}", v.name, plain(&e)));
                let resolved = resolve(name, &file, v, seed, set).map_err(wrong)?;
                if seed == file.seeds[0] {
                    known.extend(columns::keys(&file, &resolved.config).map_err(wrong)?);
                }
                arms.push(Arm { variant: i, seed, folder: Path::new("arms").join(&v.name).join(format!("seed-{seed}")), resolved });
            }
        }
        columns::check(name, &file, &arms, &known)?;
        Ok(Plan { name: name.to_string(), file, variants, arms })
    }

    /// The variant of an arm.
    pub fn variant(&self, arm: &Arm) -> &Variant {
        &self.variants[arm.variant]
    }

    /// Keeps the arms of these variants (by either name) and seeds; none means all.
    pub fn only(mut self, names: &[String], seeds: &[u64]) -> Result<Plan> {
        let is = |v: &Variant, n: &String| v.name == *n || v.of == *n;
        if let Some(n) = names.iter().find(|n| !self.variants.iter().any(|v| is(v, n))) {
            let hint = nn::nearest(n, self.variants.iter().map(|v| v.name.as_str())).map(|n| format!("; did you mean `{n}`?")).unwrap_or_default();
            return Err(Error::Usage(format!("study {} has no variant `{n}`{hint}", self.name)));
        }
        if let Some(s) = seeds.iter().find(|s| !self.file.seeds.contains(s)) {
            return Err(Error::Usage(format!("study {} has no seed {s}; its seeds are {:?}", self.name, self.file.seeds)));
        }
        let variants = &self.variants;
        self.arms
            .retain(|a| (names.is_empty() || names.iter().any(|n| is(&variants[a.variant], n))) && (seeds.is_empty() || seeds.contains(&a.seed)));
        Ok(self)
    }
}

/// The message of an error in a configuration, without what kind it is.
fn plain(e: &Error) -> String {
    match e {
        Error::Usage(m) => m.clone(),
        e => e.to_string(),
    }
}

/// Whether one of two dotted keys is the other, or holds it.
fn meets(a: &str, b: &str) -> bool {
    a == b || a.starts_with(&format!("{b}.")) || b.starts_with(&format!("{a}."))
}

/// The dotted keys that a table sets.
pub(super) fn keys(table: &toml::Table) -> Vec<String> {
    let of = |(k, v): (&String, &toml::Value)| match v {
        toml::Value::Table(t) if !t.is_empty() => keys(t).into_iter().map(|l| format!("{k}.{l}")).collect(),
        _ => vec![k.clone()],
    };
    table.iter().flat_map(of).collect()
}

fn variants(file: &StudyFile) -> Vec<Variant> {
    let one = |v: &VariantFile, value: Option<f64>| {
        let at = |name: &str| value.map_or(name.to_string(), |x| format!("{name}@{x}"));
        Variant {
            name: at(&v.name),
            of: v.name.clone(),
            about: v.about.clone(),
            value,
            baseline: at(v.baseline.as_ref().unwrap_or(&file.baseline)),
            set: v.set.clone(),
        }
    };
    match &file.sweep {
        None => file.variant.iter().map(|v| one(v, None)).collect(),
        Some(s) => file.variant.iter().flat_map(|v| s.values.iter().map(move |x| one(v, Some(*x)))).collect(),
    }
}

fn resolve(name: &str, file: &StudyFile, v: &Variant, seed: u64, set: &[String]) -> Result<Resolved> {
    let mut layers = if file.base.ends_with(".toml") {
        let path = Path::new(&file.base);
        let mut preset = presets::by_name(&Layers::base_of(path)?.unwrap_or_else(|| "quickstart".into()))?;
        preset.name = name.to_string();
        let mut layers = Layers::preset(&preset)?;
        layers.file(path)?;
        layers
    } else {
        Layers::preset(&presets::by_name(&file.base)?)?
    };
    let text = |t: &toml::Table| toml::to_string(t).map_err(|e| Error::Usage(e.to_string()));
    layers.toml(&text(&file.set)?, &format!("study {name}"))?;
    layers.toml(&text(&v.set)?, &format!("variant {}", v.of))?;
    let own = file.sweep.as_ref().zip(v.value).map(|(s, x)| format!("{}={x:?}", s.key));
    layers.set(set)?;
    layers.set(&own.into_iter().chain([format!("seed={seed}"), format!("name={}", v.name)]).collect::<Vec<_>>())?;
    layers.resolve()
}
