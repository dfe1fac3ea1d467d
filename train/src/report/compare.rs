//! Runs side by side: what came of them, and below it the settings that they differ in.

use super::Group;
use super::run::{Fact, Run, flattened};
use super::table::{Cell, Column, Row, Table};
use serde_json::Value;
use std::collections::BTreeMap;

/// Configurations in one table, so that it fits a window and a sheet of paper.
const ACROSS: usize = 6;

/// Key figures with a run in each row, then settings with a configuration in each column.
pub fn tables(runs: &[Run], groups: &[Group]) -> Vec<Table> {
    [vec![figures(runs, groups)], settings(runs, groups)].concat()
}

fn figures(runs: &[Run], groups: &[Group]) -> Table {
    let facts: Vec<Vec<Fact>> = runs.iter().map(Run::facts).collect();
    let mut labels: Vec<&str> = vec![];
    for f in facts.iter().flatten() {
        if !labels.contains(&f.label.as_str()) {
            labels.push(&f.label);
        }
    }
    // a unit that all runs share stands in the head
    let shared = |label: &str| {
        let mut all = facts.iter().flatten().filter(|f| f.label == label).map(|f| f.note.as_str());
        let first = all.next()?;
        all.all(|n| n == first).then(|| first.to_string())
    };
    let notes: Vec<Option<String>> = labels.iter().map(|l| shared(l)).collect();
    let seeds = runs.iter().any(|r| r.seed() != runs[0].seed());
    let row = |i: usize| {
        let figure = |f: &Fact, shared: bool| Cell { text: f.text.clone(), sub: (!shared).then(|| f.note.clone()), mark: "" };
        let of = |(label, note): (&&str, &Option<String>)| {
            facts[i].iter().find(|f| f.label == **label).map_or(Cell::missing(), |f| figure(f, note.is_some()))
        };
        let seed = seeds.then(|| runs[i].seed().map_or(Cell::missing(), |s| Cell::plain(s.to_string())));
        let cells = labels.iter().zip(&notes).map(of).chain(seed).collect();
        Row { head: runs[i].name.clone(), about: None, slot: groups.iter().position(|g| g.runs.contains(&i)), cells }
    };
    let columns = labels.iter().zip(&notes).map(|(l, note)| Column { note: note.clone(), ..Column::new(l) });
    Table {
        title: "Runs".into(),
        note: "What came of each run.".into(),
        first: "run".into(),
        columns: columns.chain(seeds.then(|| Column::new("seed"))).collect(),
        rows: (0..runs.len()).map(row).collect(),
        words: false,
    }
}

/// The settings that differ, in as many tables as it takes; none where the runs differ in their seeds alone.
fn settings(runs: &[Run], groups: &[Group]) -> Vec<Table> {
    let configs: Vec<BTreeMap<String, String>> =
        groups.iter().map(|g| g.runs.first().and_then(|r| runs[*r].info.as_ref()).map(flattened).unwrap_or_default()).collect();
    let mut keys: Vec<&String> = configs.iter().flat_map(BTreeMap::keys).collect();
    keys.sort();
    keys.dedup();
    keys.retain(|k| {
        *k != "name"
            && *k != "seed"
            && configs.iter().filter(|c| !c.is_empty()).any(|c| configs.iter().any(|o| !o.is_empty() && o.get(*k) != c.get(*k)))
    });
    if keys.is_empty() {
        return vec![];
    }
    let columns: Vec<usize> = (0..groups.len()).collect();
    // as many in each table, as far as that goes
    let across = groups.len().div_ceil(groups.len().div_ceil(ACROSS));
    let table = |part: &[usize]| Table {
        title: "Settings".into(),
        note: match part[0] {
            0 => "The settings that differ between them.".into(),
            _ => "The same settings of the others.".into(),
        },
        first: "setting".into(),
        columns: part.iter().map(|g| Column { slot: Some(*g), ..Column::new(&groups[*g].name) }).collect(),
        rows: keys
            .iter()
            .map(|k| Row {
                head: k.to_string(),
                about: None,
                slot: None,
                cells: part.iter().map(|g| configs[*g].get(*k).map_or(Cell::missing(), |v| Cell::plain(listed(v)))).collect(),
            })
            .collect(),
        words: true,
    };
    columns.chunks(across).map(table).collect()
}

/// A value as it is read: of a list of names, how often each follows.
fn listed(value: &str) -> String {
    let Ok(Value::Array(all)) = serde_json::from_str(value) else { return value.into() };
    let names: Vec<&str> = all.iter().filter_map(Value::as_str).collect();
    if names.is_empty() || names.len() < all.len() {
        return value.replace(',', ", ");
    }
    let said = names.chunk_by(|a, b| a == b).map(|c| if c.len() > 1 { format!("{} × {}", c.len(), c[0]) } else { c[0].into() });
    said.collect::<Vec<String>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::listed;

    #[test]
    fn lists_are_short() {
        for (value, said) in [
            (r#"["linear","linear","linear","full","linear"]"#, "3 × linear, full, linear"),
            ("[64,128]", "[64, 128]"),
            ("[]", "[]"),
            ("headwise", "headwise"),
            ("0.004", "0.004"),
        ] {
            assert_eq!(listed(value), said);
        }
    }
}
