//! How a model that is being trained does on samples that it isn't trained on.

use super::{Source, Task};
use crate::Result;
use crate::metrics::Scalars;
use crate::trainer::Learner;

/// A task's held-out samples.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Score {
    /// The task.
    pub task: Task,
    /// Labels.
    pub labels: usize,
    /// Those at which the label was the likeliest token.
    pub right: usize,
    /// The sum of the labels' negative log-likelihoods, nats.
    pub nats: f64,
}

/// Batches that are handed over at once.
const TOGETHER: usize = 16;

/// The scores of a run's tasks on its [fresh](Source::fresh) windows, in the order in which the tasks come up; none of a run of text alone.
pub fn held_out(learner: &mut dyn Learner, source: &Source) -> Result<Vec<Score>> {
    let mut scores: Vec<Score> = vec![];
    let mut fresh = source.fresh();
    loop {
        let (tasks, batches): (Vec<Vec<Task>>, Vec<_>) = fresh.by_ref().take(TOGETHER).collect::<Result<Vec<_>>>()?.into_iter().unzip();
        if batches.is_empty() {
            return Ok(scores);
        }
        for ((tasks, batch), answers) in tasks.into_iter().zip(&batches).zip(learner.answers(&batches)?) {
            let mut answers = answers.into_iter();
            for (task, window) in tasks.iter().zip(batch.targets.chunks(batch.targets.len() / tasks.len())) {
                let at = scores.iter().position(|s| s.task == *task).unwrap_or_else(|| {
                    scores.push(Score { task: *task, labels: 0, right: 0, nats: 0.0 });
                    scores.len() - 1
                });
                for a in answers.by_ref().take(window.iter().filter(|l| **l >= 0).count()) {
                    scores[at].labels += 1;
                    scores[at].right += usize::from(a.right);
                    scores[at].nats += a.nll;
                }
            }
        }
    }
}

/// Bits a label over all tasks, and how many labels; none where there are none.
pub fn bits(scores: &[Score]) -> Option<(f64, usize)> {
    let labels: usize = scores.iter().map(|s| s.labels).sum();
    (labels > 0).then(|| (scores.iter().map(|s| s.nats).sum::<f64>() / std::f64::consts::LN_2 / labels as f64, labels))
}

/// The scores as a run's metrics have them: `tasks.NAME.accuracy` and `tasks.NAME.loss` (nats a label).
pub(crate) fn scalars(scores: &[Score]) -> Scalars {
    let each = |s: &Score| {
        let n = s.labels.max(1) as f64;
        [(format!("tasks.{}.accuracy", s.task), s.right as f64 / n), (format!("tasks.{}.loss", s.task), s.nats / n)]
    };
    scores.iter().flat_map(each).collect()
}

/// The accuracies in words: `mqar 98.5%, needle 12.0%`.
pub(crate) fn said(scores: &[Score]) -> String {
    let each: Vec<String> = scores.iter().map(|s| format!("{} {:.1}%", s.task, 100.0 * s.right as f64 / s.labels.max(1) as f64)).collect();
    each.join(", ")
}
