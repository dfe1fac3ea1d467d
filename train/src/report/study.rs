//! The tables of a study.

use super::numbers::{count, plain, with_error};
use super::table::{Cell, Column, Row, Table};
use crate::measure::{RISE, WORSE};
use crate::study::{Column as Measured, Estimate, Results, Stable, State, VariantResult};

/// How a difference from the baseline is to be seen: as better or worse where it is more than two standard errors.
fn judged(column: &Measured, difference: &Estimate) -> &'static str {
    let (d, Some(e)) = (difference.mean, difference.stderr) else { return "" };
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

fn row(study: &Results, slot: usize, v: &VariantResult) -> Row {
    let is_baseline = v.name == baseline_of(study, v);
    let states = |state: State| v.arms.iter().filter(|a| a.state == state).count();
    let (done, all) = (states(State::Done), v.arms.len());
    let others = [("running", State::Running), ("pending", State::Pending), ("diverged", State::Diverged)].map(|(word, s)| (word, states(s)));
    let others: Vec<String> = others.into_iter().filter(|s| s.1 > 0).map(|(s, n)| format!("{n} {s}")).collect();
    let mut cells = vec![
        Cell { text: count(v.parameters as f64), sub: (!is_baseline).then(|| added(v.added_parameters)), mark: "" },
        Cell {
            text: format!("{done} of {all}"),
            sub: (!others.is_empty()).then(|| others.join(", ")),
            mark: if states(State::Diverged) > 0 { "failed" } else { "" },
        },
    ];
    for c in &study.columns {
        let Some(s) = v.summary.get(&c.key) else {
            cells.push(Cell::missing());
            continue;
        };
        let difference = s.difference.as_ref().filter(|_| !is_baseline);
        cells.push(Cell {
            text: with_error(s.own.mean, s.own.stderr, false),
            sub: difference.map(|d| with_error(d.mean, d.stderr, true)),
            mark: difference.map_or("", |d| judged(c, d)),
        });
    }
    if let Some(paper) = &study.paper {
        let row = paper.rows.get(if v.of.is_empty() { &v.name } else { &v.of });
        cells.extend((0..paper.columns.len()).map(|i| row.and_then(|r| r.get(i).copied()).map_or(Cell::missing(), |x| Cell::plain(plain(x)))));
    }
    let against = Some(baseline_of(study, v)).filter(|b| *b != study.baseline && !is_baseline).map(|b| format!("against {b}"));
    let about: Vec<String> = Some(v.about.clone()).filter(|a| !a.is_empty()).into_iter().chain(against).collect();
    Row { head: v.name.clone(), about: (!about.is_empty()).then(|| about.join("; ")), slot: Some(slot), cells }
}

/// What a variant is held against.
fn baseline_of<'a>(study: &'a Results, v: &'a VariantResult) -> &'a str {
    if v.baseline.is_empty() { &study.baseline } else { &v.baseline }
}

/// Means with standard errors, paired differences from the baseline below them, and the paper's figures beside them; of a sweep over learning rates, the
/// largest that each variant bore.
pub fn tables(study: &Results) -> Vec<Table> {
    let mut all = vec![];
    if !study.variants.is_empty() {
        all.push(results(study));
    }
    if let Some(s) = study.sweep.as_ref().filter(|s| !s.largest_stable.is_empty()) {
        let cell = |r: &Stable| {
            let (text, sub) = r.words(study);
            Cell { text, sub, mark: if r.lr.is_none() { "failed" } else { "" } }
        };
        let row = |r: &Stable| Row { head: r.variant.clone(), about: None, slot: None, cells: vec![cell(r)] };
        all.push(Table {
            title: "Largest stable learning rate".into(),
            note: format!(
                "The largest of the sweep's learning rates at which, and below which, no arm stopped being finite, rose by more than {RISE} nats in the mean over \
                 a tenth of it, or ended more than {WORSE} nats above a smaller rate's or a uniform guess."
            ),
            first: "variant".into(),
            columns: vec![Column::new(&s.key)],
            rows: s.largest_stable.iter().map(row).collect(),
            words: true,
        });
    }
    all
}

fn results(study: &Results) -> Table {
    let arrow = |c: &Measured| match c.better.as_deref() {
        Some("lower") => format!("{} ↓", c.label),
        Some("higher") => format!("{} ↑", c.label),
        _ => c.label.clone(),
    };
    let mut columns = vec![Column::new("parameters"), Column::new("seeds done")];
    columns.extend(study.columns.iter().map(|c| Column::new(&arrow(c))));
    if let Some(p) = &study.paper {
        columns.extend(p.columns.iter().map(|c| Column { paper: true, ..Column::new(c) }));
    }
    let own = study.variants.iter().any(|v| baseline_of(study, v) != study.baseline);
    let from = if own { "its baseline" } else { &study.baseline };
    let baseline = (!from.is_empty()).then(|| {
        format!(" Below it, the difference from {from}, seed by seed, in colour and with a sign where it is more than two standard errors from 0.")
    });
    Table {
        title: "Results".into(),
        note: format!("Mean ± standard error over seeds.{} – is not there (yet).", baseline.unwrap_or_default()),
        first: "variant".into(),
        columns,
        rows: study.variants.iter().enumerate().map(|(i, v)| row(study, i, v)).collect(),
        words: false,
    }
}

fn added(n: i64) -> String {
    format!("{}{}", if n < 0 { "−" } else { "+" }, count(n.unsigned_abs() as f64))
}
