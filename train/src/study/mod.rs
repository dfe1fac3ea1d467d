//! Studies: a base configuration, variants of it, seeds; each variant trained with each seed, measured, and put into one table with what it differs by.
//!
//! A study is a TOML file ([`StudyFile`]; `docs/studies.md` is its manual). Its folder holds a run folder for each arm (a variant with a seed), `results.json`
//! ([`Results`]) and `table.md`. Arms that are done are never trained again; one that was cut off goes on from its last checkpoint.

mod answers;
mod arm;
mod columns;
mod file;
mod plan;
mod results;
mod run;
mod stable;
mod table;

pub use arm::{Outcome, State};
pub use file::{Columns, Paper, Shipped, StudyFile, Sweep, VariantFile, shipped};
pub use plan::{Arm, Plan, Variant};
pub use results::{ArmResult, Column, Estimate, FILE, FORMAT, Results, Summary, SweepResult, VariantResult};
pub use run::run;
pub use stable::Stable;

#[cfg(test)]
mod damage_tests;
#[cfg(test)]
mod refused_tests;
#[cfg(test)]
mod tests;
