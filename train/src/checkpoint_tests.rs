//! Run folders: what is kept, what is refused, what damage does.

use super::*;

fn state(step: u64) -> State {
    State { version: 1, step, ..State::default() }
}
fn put(text: &'static str) -> impl FnOnce(&Path) -> Result<()> {
    move |dir| fs::write(dir.join(MODEL), text).map_err(Error::io("writing", dir))
}
fn newest(run: &Path) -> PathBuf {
    candidates(run).unwrap().remove(0)
}
fn steps(dir: &RunDir) -> Vec<u64> {
    checkpoints(dir.path()).unwrap().into_iter().map(|c| c.0).collect()
}

#[test]
fn keeps_the_last_and_ignores_leftovers() {
    let tmp = tempfile::tempdir().unwrap();
    let run = tmp.path().join("run");
    let dir = RunDir::open(&run, false).unwrap();
    for s in 1..=4 {
        dir.save(&state(s), 2, put("x")).unwrap();
    }
    assert_eq!(steps(&dir), [3, 4]);
    assert_eq!(read_state(&newest(&run)).unwrap().step, 4);
    let left = run.join("checkpoints/.tmp-step-00000005");
    fs::create_dir(&left).unwrap();
    fs::write(left.join(STATE), "{").unwrap();
    assert_eq!(steps(&dir), [3, 4]);
    drop(dir);
    RunDir::open(&run, true).unwrap();
    assert!(!left.exists());
    // Once more at the same step: the new one counts, and the old one is not lost.
    let dir = RunDir::open(&run, true).unwrap();
    dir.save(&state(4), 2, put("again")).unwrap();
    assert_eq!(fs::read_to_string(newest(&run).join(MODEL)).unwrap(), "again");
    assert_eq!(fs::read_to_string(run.join("checkpoints/.old-step-00000004").join(MODEL)).unwrap(), "x");
    assert_eq!(steps(&dir), [3, 4]);
    // Back to the third: what comes later is another past, and doesn't push the new ones out.
    for again in ["", "-2"] {
        let aside = dir.set_aside(2).unwrap();
        assert_eq!(aside[0], run.join(format!("checkpoints/.old-step-00000003{again}")));
        assert_eq!(steps(&dir), [0u64; 0]);
        dir.save(&state(3), 2, put("new")).unwrap();
        assert_eq!(steps(&dir), [3]);
    }
}

#[test]
fn a_damaged_checkpoint_is_skipped_and_named() {
    let tmp = tempfile::tempdir().unwrap();
    let dir = RunDir::open(&tmp.path().join("run"), false).unwrap();
    for s in 1..=3 {
        dir.save(&state(s), 9, put("x")).unwrap();
    }
    let all = candidates(dir.path()).unwrap();
    for broken in all.iter().take(2) {
        fs::write(broken.join(STATE), "{\"version\":1,").unwrap();
    }
    let mut skipped = vec![];
    let (path, found) = first_whole(&all, |p, e| skipped.push((p.to_path_buf(), e.to_string())), read_state).unwrap();
    assert_eq!((path, found.step), (all[2].clone(), 1));
    assert!(skipped.len() == 2 && skipped[0].0 == all[0] && skipped[0].1.contains("state.json"), "{skipped:?}");
    fs::remove_file(all[2].join(STATE)).unwrap();
    assert!(first_whole(&all, |_, _| {}, read_state).is_err());
}

#[test]
fn refuses_to_overwrite_and_to_share() {
    let tmp = tempfile::tempdir().unwrap();
    let run = tmp.path().join("run");
    drop(RunDir::open(&run, false).unwrap());
    // a run that never got as far as writing its configuration does not take the folder
    let dir = RunDir::open(&run, false).unwrap();
    fs::write(run.join("run.json"), "{").unwrap();
    let e = RunDir::open(&run, false).unwrap_err();
    assert!(e.to_string().contains("--resume") && e.exit_code() == 2, "{e}");
    assert!(RunDir::open(&run, true).unwrap_err().to_string().contains("another process"));
    drop(dir);
    RunDir::open(&run, true).unwrap();
    assert!(candidates(&run).unwrap_err().to_string().contains("no checkpoint"));
    assert!(candidates(&tmp.path().join("nowhere")).unwrap_err().to_string().contains("does not exist"));
    let file = tmp.path().join("file");
    fs::write(&file, "x").unwrap();
    assert!(RunDir::open(&file, false).unwrap_err().to_string().contains("a file of that name"));
}

#[test]
#[cfg(target_os = "linux")]
fn a_full_disk_keeps_the_older_checkpoint() {
    let tmp = tempfile::tempdir().unwrap();
    let dir = RunDir::open(&tmp.path().join("run"), false).unwrap();
    dir.save(&state(1), 1, put("good")).unwrap();
    let e = dir
        .save(&state(2), 1, |d| {
            fs::write(d.join(CONFIG), "half").unwrap();
            // The device that is always full.
            fs::write("/dev/full", vec![0; 10]).map_err(Error::io("writing", &d.join(MODEL)))
        })
        .unwrap_err()
        .to_string();
    assert!(e.contains("disk is full") && e.contains("--resume") && e.contains(MODEL), "{e}");
    assert_eq!(steps(&dir), [1]);
    assert_eq!(fs::read_to_string(newest(dir.path()).join(MODEL)).unwrap(), "good");
    assert_eq!(fs::read_dir(dir.path().join("checkpoints")).unwrap().count(), 1);
}

#[test]
fn a_broken_state_says_so() {
    let tmp = tempfile::tempdir().unwrap();
    fs::write(tmp.path().join(STATE), "{\"version\":1,").unwrap();
    assert!(read_state(tmp.path()).unwrap_err().to_string().contains("state.json"));
    fs::write(tmp.path().join(STATE), serde_json::to_string(&State { version: 9, ..state(1) }).unwrap()).unwrap();
    assert!(read_state(tmp.path()).unwrap_err().to_string().contains("version 9"));
    for impossible in [state(u64::MAX), State { tokens: u64::MAX, ..state(1) }, State { seconds: -1.0, ..state(1) }] {
        fs::write(tmp.path().join(STATE), serde_json::to_string(&impossible).unwrap()).unwrap();
        assert!(read_state(tmp.path()).unwrap_err().to_string().contains("older checkpoint"));
    }
    fs::write(tmp.path().join("run.json"), "{\"version\":").unwrap();
    let e = read_info(tmp.path()).unwrap_err().to_string();
    assert!(e.contains("run.json is damaged") && e.contains("config.toml --run-dir") && e.contains("--resume"), "{e}");
}

#[test]
fn a_changed_bit_and_a_changed_length_are_noticed() {
    let tmp = tempfile::tempdir().unwrap();
    let dir = RunDir::open(&tmp.path().join("run"), false).unwrap();
    // more than a block, and no whole number of words
    let bytes: Vec<u8> = (0..(1u32 << 20) + 13).map(|i| ((i * i) >> 7) as u8).collect();
    let put = |d: &Path| fs::write(d.join(MODEL), &bytes).and_then(|()| fs::write(d.join(OPTIMIZER), "xyz")).map_err(Error::io("writing", d));
    let path = dir.save(&State { ema: 0.1, corpus: Some(Fingerprint { tokens: 9, hash: u64::MAX, bytes: true }), ..state(3) }, 2, put).unwrap();
    let read = read_state(&path).unwrap();
    assert_eq!((read.step, read.ema, read.corpus.unwrap().hash), (3, 0.1, u64::MAX));
    let both = [MODEL, OPTIMIZER];
    verify(&path, &both).unwrap();
    for at in [0, 7, 8, 99_999, (1 << 20) - 1, 1 << 20, bytes.len() - 1] {
        for bit in [0, 7] {
            let mut changed = bytes.clone();
            changed[at] ^= 1 << bit;
            fs::write(path.join(MODEL), changed).unwrap();
            let e = verify(&path, &both).unwrap_err().to_string();
            assert!(e.contains(MODEL) && e.contains("not those that were written"), "{at} {bit}: {e}");
            verify(&path, &[OPTIMIZER]).unwrap();
        }
    }
    for other in [&bytes[..bytes.len() - 1], &[&bytes[..], &[0]].concat(), &[]] {
        fs::write(path.join(MODEL), other).unwrap();
        let e = verify(&path, &both).unwrap_err().to_string();
        assert!(e.contains(&format!("{} bytes were written, it has {}", bytes.len(), other.len())), "{e}");
    }
    fs::remove_file(path.join(MODEL)).unwrap();
    assert!(verify(&path, &both).unwrap_err().to_string().contains(MODEL));
    // of what nothing is written down, nothing is known
    fs::write(path.join(STATE), serde_json::to_string(&state(3)).unwrap()).unwrap();
    verify(&path, &both).unwrap();
    fs::remove_file(path.join(STATE)).unwrap();
    verify(&path, &both).unwrap();
}

#[test]
fn the_folder_of_checkpoints_means_its_run() {
    let tmp = tempfile::tempdir().unwrap();
    let dir = RunDir::open(&tmp.path().join("run"), false).unwrap();
    (1..=2).for_each(|s| drop(dir.save(&state(s), 9, put("x")).unwrap()));
    let all = candidates(dir.path()).unwrap();
    assert_eq!((all.len(), &all), (2, &candidates(&dir.path().join("checkpoints")).unwrap()));
}
