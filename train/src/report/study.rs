//! `results.json` of a study, and its table.

use super::numbers::{count, plain, with_error};
use super::table::{Cell, Column, Row, Table};
use crate::{Error, Result};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::Path;

/// The file's name in a study's folder.
pub const FILE: &str = "results.json";
/// The version that is read.
const FORMAT: u64 = 1;

/// A study's results.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Results {
    /// Its name.
    pub name: String,
    /// What it asks.
    #[serde(default)]
    pub title: String,
    /// The variant that the others are compared with.
    #[serde(default)]
    pub baseline: Option<String>,
    /// The seeds.
    #[serde(default)]
    pub seeds: Vec<u64>,
    /// What is measured.
    pub columns: Vec<Measured>,
    /// The variants.
    pub variants: Vec<Variant>,
    /// A paper's figures.
    #[serde(default)]
    pub paper: Option<Paper>,
}

/// A column of results.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Measured {
    /// By which name values are kept.
    pub key: String,
    /// What it is called.
    pub label: String,
    /// `lower` or `higher`, where one is better.
    #[serde(default)]
    pub better: Option<String>,
}

/// A variant.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Variant {
    /// Its name.
    pub name: String,
    /// What it is.
    #[serde(default)]
    pub about: Option<String>,
    /// What it sets.
    #[serde(default)]
    pub set: BTreeMap<String, Value>,
    /// Parameters.
    #[serde(default)]
    pub parameters: Option<u64>,
    /// Parameters that act on one token.
    #[serde(default)]
    pub active_parameters: Option<u64>,
    /// Parameters more than the baseline.
    #[serde(default)]
    pub added_parameters: Option<i64>,
    /// Its runs.
    #[serde(default)]
    pub arms: Vec<Arm>,
    /// Means over seeds, by column.
    #[serde(default)]
    pub summary: BTreeMap<String, Summary>,
}

/// A run of a variant.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Arm {
    /// Its seed.
    pub seed: u64,
    /// Its folder, from the study's.
    pub run: String,
    /// `done`, `running`, `pending` or `diverged`.
    pub state: String,
    /// Steps done.
    #[serde(default)]
    pub step: Option<u64>,
    /// Its results, by column.
    #[serde(default)]
    pub values: BTreeMap<String, Option<f64>>,
}

/// A mean over seeds.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Summary {
    /// The mean.
    pub mean: Option<f64>,
    /// Its standard error; none with one seed.
    #[serde(default)]
    pub stderr: Option<f64>,
    /// Seeds.
    #[serde(default)]
    pub n: u64,
    /// The same of the differences from the baseline, seed by seed.
    #[serde(default)]
    pub difference: Option<Box<Summary>>,
}

/// A paper's figures.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Paper {
    /// What they are.
    pub columns: Vec<String>,
    /// By variant.
    pub rows: BTreeMap<String, Vec<Option<f64>>>,
}

impl Results {
    /// Reads a study's results.
    pub fn read(path: &Path) -> Result<Results> {
        let bytes = std::fs::read(path).map_err(Error::io("reading", path))?;
        let wrong = |why: String| Error::Usage(format!("{}: {why}", path.display()));
        let value: Value = serde_json::from_slice(&bytes).map_err(|e| wrong(format!("is no JSON: {e}; `tidegate study` writes it anew")))?;
        match value.get("format").and_then(Value::as_u64) {
            Some(FORMAT) => {}
            found => {
                let found = found.map_or("none".into(), |f| f.to_string());
                return Err(wrong(format!("its format is {found}, and this tidegate reads {FORMAT}; use the tidegate that wrote it")));
            }
        }
        serde_json::from_value(value).map_err(|e| wrong(format!("is no study's results: {e}")))
    }

    /// How a difference from the baseline is to be seen: as better or worse where it is more than two standard errors.
    fn judged(column: &Measured, difference: &Summary) -> &'static str {
        let (Some(d), Some(e)) = (difference.mean, difference.stderr) else { return "" };
        match column.better.as_deref() {
            Some(better @ ("lower" | "higher")) if d.abs() > 2.0 * e => {
                if (d < 0.0) == (better == "lower") {
                    "better"
                } else {
                    "worse"
                }
            }
            _ => "",
        }
    }

    fn row(&self, slot: usize, v: &Variant) -> Row {
        let is_baseline = self.baseline.as_deref() == Some(v.name.as_str());
        let (done, all) = (v.arms.iter().filter(|a| a.state == "done").count(), v.arms.len());
        let states = |state: &str| v.arms.iter().filter(|a| a.state == state).count();
        let others = ["running", "pending", "diverged"].map(|s| (s, states(s))).into_iter().filter(|s| s.1 > 0);
        let others: Vec<String> = others.map(|(s, n)| format!("{n} {s}")).collect();
        let mut cells = vec![
            Cell { text: v.parameters.map_or("–".into(), |p| count(p as f64)), sub: added(v.added_parameters.filter(|_| !is_baseline)), mark: "" },
            Cell {
                text: format!("{done} of {all}"),
                sub: (!others.is_empty()).then(|| others.join(", ")),
                mark: if states("diverged") > 0 { "failed" } else { "" },
            },
        ];
        for c in &self.columns {
            let Some((s, mean)) = v.summary.get(&c.key).and_then(|s| Some((s, s.mean?))) else {
                cells.push(Cell::missing());
                continue;
            };
            let difference = s.difference.as_deref().filter(|_| !is_baseline);
            cells.push(Cell {
                text: with_error(mean, s.stderr, false),
                sub: difference.and_then(|d| Some(with_error(d.mean?, d.stderr, true))),
                mark: difference.map_or("", |d| Self::judged(c, d)),
            });
        }
        if let Some(paper) = &self.paper {
            let row = paper.rows.get(&v.name);
            cells.extend((0..paper.columns.len()).map(|i| row.and_then(|r| *r.get(i)?).map_or(Cell::missing(), |x| Cell::plain(plain(x)))));
        }
        Row { head: v.name.clone(), about: v.about.clone(), slot: Some(slot), cells }
    }

    /// Means with standard errors, paired differences from the baseline below them, and the paper's figures beside them.
    pub fn table(&self) -> Table {
        let arrow = |c: &Measured| match c.better.as_deref() {
            Some("lower") => format!("{} ↓", c.label),
            Some("higher") => format!("{} ↑", c.label),
            _ => c.label.clone(),
        };
        let mut columns = vec![Column::new("parameters"), Column::new("seeds done")];
        columns.extend(self.columns.iter().map(|c| Column::new(&arrow(c))));
        if let Some(p) = &self.paper {
            columns.extend(p.columns.iter().map(|c| Column { paper: true, ..Column::new(c) }));
        }
        let baseline = self.baseline.as_ref().map(|b| {
            format!(" Below it, the difference from {b}, seed by seed, in colour and with a sign where it is more than two standard errors from 0.")
        });
        Table {
            title: "Results".into(),
            note: format!("Mean ± standard error over seeds.{} – is not there (yet).", baseline.unwrap_or_default()),
            first: "variant".into(),
            columns,
            rows: self.variants.iter().enumerate().map(|(i, v)| self.row(i, v)).collect(),
        }
    }
}

fn added(n: Option<i64>) -> Option<String> {
    let n = n?;
    Some(format!("{}{}", if n < 0 { "−" } else { "+" }, count(n.unsigned_abs() as f64)))
}
