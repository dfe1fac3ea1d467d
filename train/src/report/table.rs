//! Tables, worked out here and set by the page.

use serde::Serialize;

/// A table.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Table {
    /// What it shows.
    pub title: String,
    /// How to read it.
    pub note: String,
    /// What its rows are.
    pub first: String,
    /// The columns behind that.
    pub columns: Vec<Column>,
    /// The rows.
    pub rows: Vec<Row>,
    /// Whether its cells are words, which are set from the left and broken, rather than figures.
    pub words: bool,
}

/// A column.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Column {
    /// Its head.
    pub label: String,
    /// The unit, if all rows share it.
    pub note: Option<String>,
    /// Whether these are a paper's figures.
    pub paper: bool,
    /// The number of the variant that it shares its colour with.
    pub slot: Option<usize>,
}

impl Column {
    /// One of our own figures.
    pub fn new(label: &str) -> Column {
        Column { label: label.into(), note: None, paper: false, slot: None }
    }
}

/// A row.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Row {
    /// What it is.
    pub head: String,
    /// The same in a sentence.
    pub about: Option<String>,
    /// The number of the variant that it shares its colour with.
    pub slot: Option<usize>,
    /// The cells.
    pub cells: Vec<Cell>,
}

/// A cell.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Cell {
    /// What it says.
    pub text: String,
    /// What it says in a second line.
    pub sub: Option<String>,
    /// `better`, `worse`, `failed` or nothing.
    pub mark: &'static str,
}

impl Cell {
    /// A text alone.
    pub fn plain(text: impl Into<String>) -> Cell {
        Cell { text: text.into(), sub: None, mark: "" }
    }
    /// What there is no figure of.
    pub fn missing() -> Cell {
        Cell::plain("–")
    }
}
