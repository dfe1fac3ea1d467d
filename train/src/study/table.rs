//! A study's table as Markdown: means over seeds with standard errors, differences from the baseline seed by seed, and the paper's figures beside.

use super::State;
use super::results::{Results, Summary, VariantResult};
use crate::report::numbers::{plain, with_error};
use std::fmt::Write;

impl Results {
    /// The table, with a line on the arms that are missing in it.
    pub fn markdown(&self) -> String {
        let mut out = String::new();
        let papers = self.paper.as_ref().map_or(&[][..], |p| &p.columns[..]);
        let heads: Vec<String> = self
            .columns
            .iter()
            .map(|c| match c.better.as_deref() {
                Some("lower") => format!("{} ↓", c.label),
                Some(_) => format!("{} ↑", c.label),
                None => c.label.clone(),
            })
            .chain(papers.iter().map(|c| format!("paper: {c}")))
            .collect();
        // where variants have baselines of their own, each is named
        let own = self.variants.iter().any(|v| v.baseline != self.baseline);
        let (against, line) = if own { (" against |", "---|") } else { ("", "") };
        let _ = writeln!(out, "| variant |{against} + parameters | seeds | {} |", heads.join(" | "));
        let _ = writeln!(out, "|---|{line}---:|---:|{}", "---:|".repeat(heads.len()));
        for v in &self.variants {
            let each = self.columns.iter().map(|c| cell(v.summary.get(&c.key)));
            let row = self.paper.as_ref().and_then(|p| p.rows.get(&v.of));
            let theirs = (0..papers.len()).map(|i| row.and_then(|r| r.get(i)).map_or(String::new(), |x| plain(*x)));
            let name = if v.name == v.baseline { format!("**{}**", v.name) } else { v.name.clone() };
            let cells: Vec<String> = each.chain(theirs).collect();
            let against = match (own, v.name == v.baseline) {
                (false, _) => String::new(),
                (true, true) => " — |".into(),
                (true, false) => format!(" {} |", v.baseline),
            };
            let _ = writeln!(out, "| {name} |{against} {:+} | {} | {} |", v.added_parameters, ended(v), cells.join(" | "));
        }
        if let Some(s) = &self.sweep
            && !s.largest_stable.is_empty()
        {
            let _ = writeln!(out, "\n| variant | largest stable {} |\n|---|---:|", s.key);
            for row in &s.largest_stable {
                let (words, more) = row.words(self);
                let more = more.map(|m| if row.pending.is_empty() { format!(" ({m})") } else { format!("; {m}") });
                let _ = writeln!(out, "| {} | {words}{} |", row.variant, more.unwrap_or_default());
            }
        }
        let arms = || self.variants.iter().flat_map(|v| &v.arms);
        let count = |state: State| arms().filter(|a| a.state == state).count();
        let _ = write!(out, "\n{} of {} arms are done", count(State::Done), arms().count());
        for (state, word) in [(State::Diverged, "diverged"), (State::Running, "are not at their end"), (State::Pending, "have not begun")] {
            if count(state) > 0 {
                let _ = write!(out, ", {} {word}", count(state));
            }
        }
        let from = if own { "the variant under `against`" } else { &self.baseline };
        let _ = writeln!(
            out,
            ".\nMean ± standard error over seeds; in brackets the difference from {from} with the same seed. Parameters are counted from there, too."
        );
        if let Some(p) = &self.paper {
            let _ = writeln!(out, "Paper: {}.", p.source);
        }
        out
    }
}

/// How many seeds are done; those that diverged beside.
fn ended(v: &VariantResult) -> String {
    let count = |state: State| v.arms.iter().filter(|a| a.state == state).count();
    match count(State::Diverged) {
        0 => count(State::Done).to_string(),
        n => format!("{} ({n} diverged)", count(State::Done)),
    }
}

fn cell(s: Option<&Summary>) -> String {
    let Some(s) = s else { return "—".into() };
    let own = with_error(s.own.mean, s.own.stderr, false);
    s.difference.as_ref().map_or(own.clone(), |d| format!("{own} ({})", with_error(d.mean, d.stderr, true)))
}
