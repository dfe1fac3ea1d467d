//! Samples against what their definitions say of them.

use super::*;
use std::collections::HashSet;

fn point(length: usize) -> Point {
    Point { length, pairs: None, difficulty: None, depth: None }
}
fn mqar(s: &Settings, vocab: usize, length: usize, pairs: usize, index: u64) -> Sample {
    generate(Task::Mqar, s, vocab, None, &Point { pairs: Some(pairs), ..point(length) }, 7, index).unwrap()
}
/// Positions that ask, with what is read and asked there.
fn asked(s: &Sample) -> Vec<(usize, u32, u32)> {
    assert_eq!(s.tokens.len(), s.labels.len());
    (0..s.tokens.len()).filter(|i| s.labels[*i] != IGNORE).map(|i| (i, s.tokens[i], s.labels[i] as u32)).collect()
}

#[test]
fn mqar_asks_for_each_value_once() {
    let mut s = Settings::default();
    s.mqar.pairs = vec![4, 8, 16];
    for (length, pairs, vocab) in [(64, 4, 64), (64, 16, 34), (128, 8, 8192)] {
        let mut odd = 0;
        for index in 0..200 {
            let x = mqar(&s, vocab, length, pairs, index);
            let stated: Vec<(u32, u32)> = x.tokens[..2 * pairs].chunks(2).map(|p| (p[0], p[1])).collect();
            assert!(stated.iter().all(|(k, v)| (1..vocab as u32 / 2).contains(k) && (vocab as u32 / 2..vocab as u32).contains(v)));
            assert_eq!(stated.iter().map(|p| p.0).collect::<HashSet<_>>().len(), pairs);
            assert_eq!(stated.iter().map(|p| p.1).collect::<HashSet<_>>().len(), pairs);
            let asks = asked(&x);
            assert!(asks.iter().all(|(at, _, _)| *at >= 2 * pairs && at.is_multiple_of(2)));
            let asks: HashSet<(u32, u32)> = asks.iter().map(|(_, k, v)| (*k, *v)).collect();
            assert_eq!(asks, stated.into_iter().collect());
            assert!(x.tokens.iter().all(|t| (*t as usize) < vocab) && x.tokens.len() == length);
            odd += x.tokens[2 * pairs..].iter().skip(1).step_by(2).filter(|t| **t != 0).count();
        }
        assert!(odd > 0, "places between queries are random");
    }
    s.mqar.random_non_queries = false;
    let x = mqar(&s, 64, 64, 4, 0);
    assert_eq!(x.tokens[8..].iter().filter(|t| **t != 0).count(), 4);
}

#[test]
fn mqar_gaps_are_those_of_its_authors() {
    // by tests/oracles/mqar.py: how often each of the first places asks, and how often it asks for the first pair
    let theirs: [(usize, usize, f64, [f64; 6], [f64; 4]); 3] = [
        (4, 64, 0.01, [0.721, 0.474, 0.349, 0.272, 0.227, 0.19], [0.25, 0.126, 0.085, 0.064]),
        (8, 64, 0.01, [0.958, 0.821, 0.687, 0.583, 0.506, 0.441], [0.263, 0.131, 0.088, 0.066]),
        (4, 32, 1.0, [0.333, 0.334, 0.332, 0.333, 0.333, 0.333], [0.083, 0.084, 0.084, 0.083]),
    ];
    let mut s = Settings::default();
    s.mqar.pairs = vec![4, 8];
    for (pairs, length, a, asks, first) in theirs {
        s.mqar.power_a = a;
        let n = 20_000;
        let (mut used, mut firsts) = ([0.0; 6], [0.0; 4]);
        for index in 0..n {
            let x = mqar(&s, 128, length, pairs, index);
            for (at, key, _) in asked(&x) {
                let gap = (at - 2 * pairs) / 2;
                if gap < 6 {
                    used[gap] += 1.0 / n as f64;
                }
                if gap < 4 && key == x.tokens[0] {
                    firsts[gap] += 1.0 / n as f64;
                }
            }
        }
        // five standard errors of a frequency at most
        let near = |x: &[f64], y: &[f64]| x.iter().zip(y).all(|(x, y)| (x - y).abs() < 5.0 * (0.25 / n as f64).sqrt());
        assert!(near(&used, &asks) && near(&firsts, &first), "{pairs} {length} {a}: {used:?} {firsts:?}");
    }
}

fn needle(s: &Settings, vocab: usize, length: usize, difficulty: usize, depth: Option<f64>, index: u64) -> Sample {
    generate(Task::Needle, s, vocab, None, &Point { difficulty: Some(difficulty), depth, ..point(length) }, 7, index).unwrap()
}

#[test]
fn a_needle_lies_where_it_was_put() {
    let mut s = Settings::default();
    s.needle.difficulty = vec![1, 2, 3];
    for (difficulty, n) in [(1, 1), (2, 1), (3, 8)] {
        let length = 100;
        let size = length - 2 * n - 3;
        for (depth, before) in [(0.0, 0), (0.5, (0.5 * size as f64).round() as usize), (1.0, size)] {
            for index in 0..20 {
                let x = needle(&s, 40, length, difficulty, Some(depth), index);
                let at: Vec<usize> = (0..length).filter(|i| x.tokens[*i] == 0).collect();
                assert_eq!(at, [before, length - n - 1], "the marker stands before the needle and the question");
                let (key, value) = (x.tokens[before + 1], &x.tokens[before + 2..before + 2 + n]);
                assert!((1..20).contains(&key) && value.iter().all(|v| (20..40).contains(v)));
                assert_eq!(x.tokens[length - n..], [&[key], &value[..n - 1]].concat());
                assert_eq!(asked(&x).iter().map(|a| a.2).collect::<Vec<_>>(), value);
                assert_eq!(x.labels[..length - n], vec![IGNORE; length - n]);
            }
        }
    }
    // drawn depths cover everything
    let places: HashSet<usize> = (0..400).map(|i| needle(&s, 40, 16, 2, None, i).tokens.iter().position(|t| *t == 0).unwrap()).collect();
    assert_eq!(places.len(), 16 - 5 + 1);
    // the pattern is one and the same; random filler isn't
    let hay = |d: usize, i: u64| needle(&s, 40, 100, d, Some(1.0), i).tokens[..64].to_vec();
    assert!(hay(1, 0) == hay(1, 1) && hay(1, 0)[..16] == hay(1, 0)[16..32] && hay(2, 0) != hay(2, 1));
}

#[test]
fn a_needle_lies_in_text() {
    let mut s = Settings::default();
    s.needle.filler = Filler::Text;
    let text = "abc\0efghij";
    let corpus = Corpus::from_documents(&[text]);
    let hay = Haystack { corpus: &corpus, range: 0..10 };
    let make = |text, vocab| generate(Task::Needle, &s, vocab, text, &Point { difficulty: Some(2), depth: Some(1.0), ..point(30) }, 1, 0);
    let x = make(Some(&hay), 256).unwrap();
    let read = &x.tokens[..25];
    let begin = text.bytes().position(|b| u32::from(b) == read[0] || b == 0 && read[0] == 1).unwrap();
    // from there to the text's end, then from its beginning
    let whole: Vec<u32> = text.bytes().skip(begin).chain(text.bytes().cycle().take(30)).map(|b| u32::from(b).max(1)).take(25).collect();
    assert_eq!(read, whole);
    assert!(make(None, 256).unwrap_err().to_string().contains("data.path"));
    assert!(make(Some(&hay), 64).unwrap_err().to_string().contains("outside the needle task's vocabulary of 64"));
}

#[test]
fn selective_copying_and_induction() {
    let mut s = Settings::default();
    s.selective_copy.tokens = 5;
    let mut spread = vec![0; 5];
    for index in 0..2000 {
        let x = generate(Task::SelectiveCopy, &s, 16, None, &point(40), 3, index).unwrap();
        let data: Vec<u32> = x.tokens[..34].iter().copied().filter(|t| *t != 14).collect();
        assert!(data.len() == 5 && data.iter().all(|t| *t < 14), "{data:?}");
        assert_eq!(x.tokens[34..], [15, 14, 14, 14, 14, 14]);
        assert_eq!(asked(&x).iter().map(|a| (a.0, a.2)).collect::<Vec<_>>(), (35..40).zip(data.iter().copied()).collect::<Vec<_>>());
        assert_ne!(x.tokens[33], 14, "blanks stand before tokens");
        let mut place = 0;
        for t in &x.tokens[..34] {
            if *t == 14 { spread[place] += 1 } else { place += 1 }
        }
    }
    // 29 blanks, evenly over five places
    assert!(spread.iter().all(|n| (*n as f64 / 2000.0 - 29.0 / 5.0).abs() < 0.3), "{spread:?}");
    let mut places = HashSet::new();
    for index in 0..500 {
        let x = generate(Task::Induction, &s, 16, None, &point(20), 3, index).unwrap();
        let special: Vec<usize> = (0..20).filter(|i| x.tokens[*i] == 15).collect();
        assert!(special.len() == 2 && special[1] == 19);
        assert_eq!(asked(&x), [(19, 15, x.tokens[special[0] + 1])]);
        places.insert(special[0]);
    }
    assert_eq!(places.len(), 18);
}

#[test]
fn samples_are_functions_of_seed_and_index() {
    let s = Settings::default();
    for task in Task::GENERATED {
        let p = s.points(task, s.lengths(task)[0])[0];
        let make = |seed, index| generate(task, &s, 64, None, &p, seed, index).unwrap();
        assert_eq!(make(1, 5), make(1, 5));
        let all: HashSet<Vec<u32>> = (0..100).map(|i| make(1, i).tokens).chain((0..100).map(|i| make(2, i).tokens)).collect();
        assert_eq!(all.len(), 200, "{task}");
    }
}

#[test]
fn wrong_settings_say_what_is_right() {
    let with = |change: fn(&mut Settings)| {
        let mut s = Settings { share: 1.0, mix: Mix { mqar: 1.0, needle: 1.0, selective_copy: 1.0, induction: 1.0 }, ..Settings::default() };
        change(&mut s);
        s.validate(64, 256).err().map(|e| e.to_string()).unwrap_or_default()
    };
    assert_eq!(with(|_| {}), "");
    let cases: [(fn(&mut Settings), &[&str]); 17] = [
        (|s| s.share = 1.5, &["tasks.share", "from 0 to 1", "1.5"]),
        (|s| s.mix.mqar = -1.0, &["tasks.mix.mqar", "-1"]),
        (|s| s.mix = Mix::default(), &["names no task", "selective-copy"]),
        (|s| s.mqar.vocab = Some(100), &["tasks.mqar.vocab", "at most the model's vocabulary of 64", "100"]),
        (|s| s.mqar.pairs = vec![], &["tasks.mqar.pairs", "[]"]),
        (|s| s.mqar.pairs = vec![0], &["tasks.mqar.pairs", "at least 1"]),
        (|s| s.mqar.pairs = vec![100], &["tasks.mqar.length", "at least 400", "64"]),
        (|s| s.mqar.pairs = vec![usize::MAX], &["tasks.mqar.length"]),
        (|s| (s.mqar.pairs, s.mqar.length) = (vec![40], vec![160]), &["tasks.mqar.vocab", "at least 82", "64"]),
        (|s| s.mqar.length = vec![65], &["tasks.mqar.length", "even", "65"]),
        (|s| s.mqar.length = vec![512], &["tasks.mqar.length", "data.seq_len, 256", "512"]),
        (|s| s.mqar.power_a = f64::NAN, &["tasks.mqar.power_a", "NaN"]),
        (|s| s.needle.difficulty = vec![4], &["tasks.needle.difficulty", "1, 2 or 3", "4"]),
        (|s| (s.needle.difficulty, s.needle.length) = (vec![3], vec![19]), &["tasks.needle.length", "19"]),
        (|s| s.selective_copy.length = vec![33], &["tasks.selective-copy.length", "at least 34", "33"]),
        (|s| s.selective_copy.vocab = 3, &["tasks.selective-copy.vocab", "at least 4"]),
        (|s| s.induction.length = vec![3], &["tasks.induction.length", "at least 4"]),
    ];
    for (change, words) in cases {
        let m = with(change);
        assert!(words.iter().all(|w| m.contains(w)), "{words:?}: {m}");
    }
    // what isn't drawn isn't looked at
    let s = Settings {
        share: 1.0,
        mix: Mix { induction: 1.0, ..Mix::default() },
        mqar: Mqar { pairs: vec![], ..Mqar::default() },
        ..Settings::default()
    };
    assert!(s.validate(64, 256).is_ok());
    for (name, meant) in [("mqra", "mqar"), ("niah1", "niah-1"), ("selective_copy", "selective-copy")] {
        assert!(Task::by_name(name).unwrap_err().to_string().contains(&format!("did you mean `{meant}`")), "{name}");
    }
}
