//! The numbers that arms can have, which columns are named by.

use super::arm::measuring;
use super::file::StudyFile;
use super::{answers, plan};
use crate::config::RunConfig;
use crate::measure::{Measures, had_by};
use crate::{Error, Result};
use std::collections::BTreeSet;

/// Of training and of the held-out text.
const TRAINED: [&str; 9] =
    ["train_loss", "rise", "spikes", "spikes_7_sigma", "seconds", "tokens_per_s", "held_out_bits", "held_out_bits_per_byte", "held_out_loss"];

/// The names of the numbers that an arm with this configuration can have; an error if what is asked of it once it is trained can't be.
pub(super) fn keys(file: &StudyFile, config: &RunConfig) -> Result<BTreeSet<String>> {
    let mut out: BTreeSet<String> = TRAINED.map(String::from).into();
    if config.tasks.share > 0.0 {
        out.extend(config.tasks.weights().iter().flat_map(|(t, _)| [format!("tasks.{t}.accuracy"), format!("tasks.{t}.loss")]));
    }
    if let Some(eval) = &file.eval {
        out.extend(answers::check_arm(eval, config)?);
    }
    let options = measuring(&file.measure, config);
    if let Some(context) = options.context.filter(|c| *c < config.data.seq_len) {
        return Err(Error::Usage(format!("measure.context: expected at least data.seq_len, {}, found {context}", config.data.seq_len)));
    }
    let measured = Measures::keys(&config.model, &options)?.into_iter().filter(|k| k != "loss");
    out.extend(measured.map(|k| if k == "bits_per_byte" { "measured_bits_per_byte".into() } else { k }));
    Ok(out)
}

/// An error if a column can have no number, or a measure is of nothing, whatever the arm.
pub(super) fn check(name: &str, file: &StudyFile, arms: &[plan::Arm], known: &BTreeSet<String>) -> Result<()> {
    if let Some(c) = file.columns.iter().find(|c| !known.contains(&c.key)) {
        let hint = nn::nearest(&c.key, known.iter().map(String::as_str)).map(|n| format!("; did you mean `{n}`?")).unwrap_or_default();
        return Err(Error::Usage(format!("study {name}: column `{}`: no arm of this study has a number of that name{hint}", c.key)));
    }
    let had = |m: &String| arms.iter().any(|a| had_by(&a.resolved.config.model, std::slice::from_ref(m)).contains(m));
    match file.measure.only.iter().find(|m| !had(m)) {
        Some(m) => Err(Error::Usage(format!("study {name}: measure.only: no variant has anything of `{m}`; leave it out"))),
        None => Ok(()),
    }
}
