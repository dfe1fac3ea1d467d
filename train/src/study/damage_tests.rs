//! Files of a study's folder that were cut off or written over.

use super::tests::{TINY, go, message, plan};
use super::*;
use crate::Error;
use std::fs;
use std::path::Path;

fn cut(path: &Path) {
    let text = fs::read(path).unwrap();
    fs::write(path, &text[..text.len() / 2]).unwrap();
}

#[test]
fn damaged_results_are_written_anew() {
    let tmp = tempfile::tempdir().unwrap();
    let whole = plan(TINY, &[]).unwrap();
    let part = whole.clone().only(&["gate".into()], &[1]).unwrap();
    let before = go(&part, &whole, tmp.path()).unwrap();
    let results = tmp.path().join(FILE);
    cut(&results);
    assert!(Results::read(&results).unwrap_err().to_string().contains("writes it anew"));
    assert!(go(&part, &whole, tmp.path()).unwrap() == before && Results::read(&results).unwrap() == before);
    fs::write(&results, r#"{"format": 1}"#).unwrap();
    assert!(go(&part, &whole, tmp.path()).unwrap() == before);
    // of another version, or in a folder that is no study's, it is left alone
    fs::write(&results, r#"{"format": 2}"#).unwrap();
    assert!(message(go(&part, &whole, tmp.path())).contains("its format is 2"));
    let other = tempfile::tempdir().unwrap();
    fs::write(other.path().join(FILE), "[1, 2").unwrap();
    assert!(message(go(&part, &whole, other.path())).contains("is no JSON"));
    assert_eq!(fs::read(other.path().join(FILE)).unwrap(), b"[1, 2");
}

#[test]
fn damaged_answers_are_asked_for_again() {
    let tmp = tempfile::tempdir().unwrap();
    let text = TINY.replace("[measure]", "[eval]\ntasks = [\"needle\"]\nlengths = [32]\ndepths = 2\nsamples = 2\n\n[measure]");
    let whole = plan(&text, &[]).unwrap().only(&["gate".into()], &[1]).unwrap();
    let before = go(&whole, &whole, tmp.path()).unwrap();
    cut(&tmp.path().join("arms/gate/seed-1").join(crate::tasks::FILE));
    assert!(go(&whole, &whole, tmp.path()).unwrap() == before);
}

#[test]
fn an_arm_without_a_whole_checkpoint() {
    let tmp = tempfile::tempdir().unwrap();
    let whole = plan(TINY, &["checkpoint.every=2"]).unwrap().only(&["gate".into()], &[1]).unwrap();
    go(&whole, &whole, tmp.path()).unwrap();
    let run = tmp.path().join("arms/gate/seed-1");
    fs::remove_file(run.join(crate::measure::FILE)).unwrap();
    for c in crate::checkpoint::checkpoints(&run).unwrap() {
        cut(&c.1.join(crate::checkpoint::MODEL));
    }
    let Err(Error::Checkpoint(m)) = go(&whole, &whole, tmp.path()) else { panic!("no error of a checkpoint") };
    assert!(m.contains("gate/seed-1 holds no whole checkpoint") && m.contains("remove that folder to train the arm anew"), "{m}");
    fs::remove_dir_all(&run).unwrap();
    assert_eq!(go(&whole, &whole, tmp.path()).unwrap().variants[0].arms[0].state, State::Done);
}
