use super::*;
use crate::data::Packing;
use crate::presets;
use crate::tasks::{Mix, Mqar, Needle, Settings};

fn config(share: f64) -> RunConfig {
    let mut c = presets::smoke();
    c.tasks = Settings {
        share,
        mix: Mix { mqar: 1.0, needle: 3.0, ..Mix::default() },
        mqar: Mqar { pairs: vec![2, 4], length: vec![16, 40], ..Mqar::default() },
        needle: Needle { length: vec![16, 64], ..Needle::default() },
        ..Settings::default()
    };
    c.data.seq_len = 64;
    c.data.batch = 5;
    c.train.accumulate = 3;
    c
}
fn text() -> Corpus {
    let documents: Vec<String> = (0..60).map(|i| format!("It was the whiteness of the whale that {i} above all things appalled me. ")).collect();
    Corpus::from_documents(&documents)
}

#[test]
fn without_tasks_batches_are_those_of_the_text() {
    let corpus = text();
    for packing in [Packing::Windows, Packing::Documents] {
        let mut c = config(0.0);
        c.data.packing = packing;
        let plain = Sampler::new(&corpus, corpus.split(c.data.held_out).0, c.seed, 5, 64, 3, packing).unwrap();
        let source = Source::new(&corpus, &c).unwrap();
        assert!((0..20).all(|i| source.batch(i, i % 3).unwrap() == plain.batch(&corpus, i, i % 3)));
        assert_eq!(source.fresh().count(), 0);
    }
}

#[test]
fn windows_hold_whole_samples_and_padding() {
    let (corpus, c) = (text(), config(1.0));
    let source = Source::new(&corpus, &c).unwrap();
    let (mut lengths, mut of_needle, mut all) = (std::collections::BTreeSet::new(), 0, 0);
    for step in 0..30 {
        let b = source.batch(step, 1).unwrap();
        assert_eq!(b, source.batch(step, 1).unwrap());
        assert_eq!((b.rows, b.time, b.tokens.len(), b.targets.len()), (1, 320, 320, 320));
        let cu = b.cu_seqlens.unwrap();
        assert!((0..=5).all(|w| cu.contains(&(64 * w))), "windows begin anew: {cu:?}");
        for w in cu.windows(2) {
            let (from, to) = (w[0] as usize, w[1] as usize);
            let (tokens, targets) = (&b.tokens[from..to], &b.targets[from..to]);
            match targets.iter().filter(|t| **t != IGNORE).count() {
                // what is left behind samples of 40
                0 => assert!(to - from == 24 && tokens.iter().all(|t| *t == 0)),
                1 => (of_needle, all) = (of_needle + to - from, all + to - from),
                n => {
                    assert!([2, 4].contains(&n));
                    all += to - from;
                }
            }
            lengths.insert(to - from);
        }
    }
    assert_eq!(lengths.into_iter().collect::<Vec<_>>(), [16, 24, 40, 64]);
    let part = of_needle as f64 / all as f64;
    assert!((0.7..0.85).contains(&part), "three windows of four are of the needle: {part}");
    // evaluations see other samples, the same each time
    let fresh: Vec<_> = source.fresh().map(|f| f.unwrap()).collect();
    assert_eq!(fresh.len(), 1024usize.div_ceil(320));
    assert!(fresh.iter().zip(source.fresh()).all(|(a, b)| *a == b.unwrap()));
    assert!((0..30).all(|s| fresh.iter().all(|f| f.1.tokens != source.batch(s, 0).unwrap().tokens)));
}

#[test]
fn a_share_of_the_windows_is_tasks_and_no_text_is_left_out() {
    let (corpus, c) = (text(), config(0.3));
    let source = Source::new(&corpus, &c).unwrap();
    let plain = Sampler::new(&corpus, corpus.split(c.data.held_out).0, c.seed, 5, 64, 3, Packing::Windows).unwrap();
    let (mut tasks, mut seen) = (0, 0);
    for i in 0..40u64 {
        let b = source.batch(i / 3, i % 3).unwrap();
        for w in 0..5 {
            let range = 64 * w..64 * (w + 1);
            if b.targets[range.clone()].contains(&IGNORE) {
                tasks += 1;
                continue;
            }
            let window = plain.at(seen);
            let mut tokens = vec![];
            corpus.read(window.start..window.end + 1, &mut tokens);
            assert_eq!(b.tokens[range.clone()], tokens[..64]);
            assert!(b.targets[range].iter().eq(tokens[1..].iter().map(|t| i64::from(*t)).collect::<Vec<_>>().iter()));
            seen += 1;
        }
    }
    assert_eq!((tasks, seen), (60, 140));
}
