//! A study's TOML file, and the studies that come with the program.

use crate::{Error, Result};
use nn::nearest;
use serde::{Deserialize, Serialize};
use std::path::Path;

/// A study as its file says it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StudyFile {
    /// What the report is headed with.
    pub title: String,
    /// What is asked, in a sentence or two.
    #[serde(default)]
    pub about: String,
    /// The preset, or TOML file of a run (relative to this file), that all variants start from.
    pub base: String,
    /// Each variant is trained once with each: it decides initial values and the order of the text.
    pub seeds: Vec<u64>,
    /// The variant that the others are held against, seed by seed.
    pub baseline: String,
    /// On top of the base, for all variants.
    #[serde(default)]
    pub set: toml::Table,
    /// What differs.
    pub variant: Vec<VariantFile>,
    /// Trains each variant with each of several values of one key, too.
    #[serde(default)]
    pub sweep: Option<Sweep>,
    /// What is measured once an arm is trained.
    #[serde(default)]
    pub measure: Measure,
    /// Generated tasks that an arm is asked once it is trained.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub eval: Option<EvalFile>,
    /// The columns of the table, by the names of measures.
    pub columns: Vec<Columns>,
    /// What the paper found, to stand beside.
    #[serde(default)]
    pub paper: Option<Paper>,
}

/// A variant.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VariantFile {
    /// Letters, digits, `-`, `_` and `.`.
    pub name: String,
    /// In words.
    #[serde(default)]
    pub about: String,
    /// The variant that this one is held against, if not the study's.
    #[serde(default)]
    pub baseline: Option<String>,
    /// On top of the study's own.
    #[serde(default)]
    pub set: toml::Table,
}

/// Several values of one key.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Sweep {
    /// As in `--set`.
    pub key: String,
    /// From the smallest.
    pub values: Vec<f64>,
}

/// What is measured.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Measure {
    /// Names of measures, as `tidegate measure --only` has them; none: all that a model has something of.
    pub only: Vec<String>,
    /// Held-out tokens that each pass reads.
    pub tokens: usize,
    /// Tokens of the windows that the loss by position is taken in; not set: 8 times the training length.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub context: Option<usize>,
}

impl Default for Measure {
    fn default() -> Self {
        Measure { only: vec![], tokens: 1 << 15, context: None }
    }
}

/// Generated tasks that an arm is asked once it is trained; their settings are those of the arm's `[tasks]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EvalFile {
    /// Their names, as `tidegate eval --task` has them.
    pub tasks: Vec<String>,
    /// Tokens of samples; none: as the settings say.
    #[serde(default)]
    pub lengths: Vec<usize>,
    /// Depths of needles, evenly from 0 to 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub depths: Option<usize>,
    /// Samples of each length and depth.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub samples: Option<usize>,
    /// Tokens of the text in which one needle is followed through all states; 0: none is.
    #[serde(default)]
    pub passage: usize,
}

/// A column of the table.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Columns {
    /// A scalar's name: `held_out_bits`, `measured_bits_per_byte`, `first_token`, …
    pub key: String,
    /// Its heading.
    pub label: String,
    /// `lower` or `higher`, where one of them is better.
    #[serde(default)]
    pub better: Option<String>,
}

/// A paper's figures.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Paper {
    /// Where they stand.
    #[serde(default)]
    pub source: String,
    /// Their headings.
    pub columns: Vec<String>,
    /// By variant; the last columns may be missing.
    pub rows: std::collections::BTreeMap<String, Vec<f64>>,
}

/// A study that comes with the program.
#[derive(Clone, Copy, Debug)]
pub struct Shipped {
    /// Its name.
    pub name: &'static str,
    /// Its file.
    pub text: &'static str,
}

macro_rules! studies {
    ($($name:literal),*) => { &[$(Shipped { name: $name, text: include_str!(concat!("../../studies/", $name, ".toml")) }),*] };
}

/// The studies that come with the program.
pub fn shipped() -> &'static [Shipped] {
    studies![
        "gate-positions",
        "gate-scores",
        "switch-heads",
        "learning-rate",
        "hybrid-ratio",
        "decay-and-erase",
        "needle",
        "recall",
        "extrapolation",
        "ablation",
        "hybrid-order"
    ]
}

impl StudyFile {
    /// Reads a study by its shipped name or from a TOML file; its name and its file.
    pub fn open(what: &str) -> Result<(String, StudyFile)> {
        if let Some(s) = shipped().iter().find(|s| s.name == what) {
            return Ok((s.name.to_string(), StudyFile::parse(s.text, what)?));
        }
        let path = Path::new(what);
        let text = std::fs::read_to_string(path).map_err(|e| {
            let hint = nearest(what, shipped().iter().map(|s| s.name)).map(|n| format!(" (did you mean `{n}`?)")).unwrap_or_default();
            let names: Vec<&str> = shipped().iter().map(|s| s.name).collect();
            Error::Usage(format!("no study and no file is called `{what}`{hint}: {e}; the studies that come with tidegate are {}", names.join(", ")))
        })?;
        let name = path.file_stem().and_then(|s| s.to_str()).unwrap_or("study").to_string();
        let mut file = StudyFile::parse(&text, what)?;
        // a base that is a file lies beside the study
        let beside = path.parent().unwrap_or(Path::new("")).join(&file.base);
        if file.base.ends_with(".toml") && beside.is_file() {
            file.base = beside.display().to_string();
        }
        Ok((name, file))
    }

    /// Reads and checks a study's text; `source` names it in messages.
    pub fn parse(text: &str, source: &str) -> Result<StudyFile> {
        let wrong = |m: String| Error::Usage(format!("study {source}: {m}"));
        let file: StudyFile = toml::from_str(text).map_err(|e| wrong(e.to_string()))?;
        let name_is_plain = |n: &str| !n.is_empty() && !n.starts_with('.') && n.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c));
        for (i, v) in file.variant.iter().enumerate() {
            if !name_is_plain(&v.name) {
                return Err(wrong(format!("variant `{}`: a name is letters, digits, `-`, `_` and `.`, and is that of a folder", v.name)));
            }
            if file.variant[..i].iter().any(|w| w.name == v.name) {
                return Err(wrong(format!("there are two variants `{}`", v.name)));
            }
        }
        for name in std::iter::once(&file.baseline).chain(file.variant.iter().filter_map(|v| v.baseline.as_ref())) {
            if !file.variant.iter().any(|v| v.name == *name) {
                let hint = nearest(name, file.variant.iter().map(|v| v.name.as_str())).map(|n| format!("; did you mean `{n}`?")).unwrap_or_default();
                return Err(wrong(format!("the baseline `{name}` is no variant{hint}")));
            }
        }
        if file.seeds.is_empty() {
            return Err(wrong("`seeds` is empty; name at least one, as in seeds = [1, 2, 3]".into()));
        }
        if let Some(s) = file.seeds.iter().enumerate().find(|(i, s)| file.seeds[..*i].contains(s)) {
            return Err(wrong(format!("seed {} is named twice", s.1)));
        }
        if let Some(s) = &file.sweep
            && (s.values.is_empty() || !s.values.is_sorted_by(|a, b| a < b))
        {
            return Err(wrong(format!("the sweep's values of `{}` are to rise, and to be one at least, found {:?}", s.key, s.values)));
        }
        if let Some(c) = file.columns.iter().find(|c| !matches!(c.better.as_deref(), None | Some("lower" | "higher"))) {
            return Err(wrong(format!(
                "column `{}`: `better` is \"lower\" or \"higher\", found \"{}\"",
                c.key,
                c.better.as_deref().unwrap_or_default()
            )));
        }
        crate::measure::check_names(&file.measure.only).map_err(|e| wrong(format!("measure.only: {e}")))?;
        if file.measure.tokens == 0 {
            return Err(wrong("measure.tokens: expected at least one window's, found 0".into()));
        }
        if let Some(eval) = &file.eval {
            super::answers::check(eval).map_err(|e| wrong(e.to_string()))?;
        }
        if let Some(p) = &file.paper {
            for (name, row) in &p.rows {
                if !file.variant.iter().any(|v| v.name == *name) {
                    return Err(wrong(format!("the paper's row `{name}` is of no variant")));
                }
                if row.len() > p.columns.len() {
                    return Err(wrong(format!("the paper's row `{name}` has {} figures for {} columns", row.len(), p.columns.len())));
                }
            }
        }
        Ok(file)
    }
}
