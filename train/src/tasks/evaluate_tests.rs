use super::*;
use crate::presets;
use crate::tasks::{Filler, Mqar, Needle};
use engine::DType;
use nn::Placement;

fn model() -> Decoder {
    let mut c = presets::smoke().model;
    c.max_position_embeddings = 4096;
    Decoder::on(&c, 3, &Placement::cpu(DType::F32)).unwrap()
}
fn options() -> Options<'static> {
    let needle = Needle { difficulty: vec![1, 2], length: vec![40], ..Needle::default() };
    let mqar = Mqar { pairs: vec![2, 4, 20], length: vec![16, 64], ..Mqar::default() };
    Options { samples: Some(3), depths: Some(3), ..Options::new(Settings { needle, mqar, ..Settings::default() }) }
}

#[test]
fn cells_are_settings_that_fit() {
    let model = model();
    let mut told = vec![];
    let r = evaluate(&model, &[Task::Mqar, Task::Needle], &options(), &mut |n, of| told.push((n, of))).unwrap();
    let of = |c: &Cell| (c.length, c.pairs, c.difficulty, c.depth);
    assert_eq!(
        r.tasks[0].cells.iter().map(of).collect::<Vec<_>>(),
        [(16, Some(2), None, None), (16, Some(4), None, None), (64, Some(2), None, None), (64, Some(4), None, None)]
    );
    let needles: Vec<_> = [1, 2].iter().flat_map(|d| [0.0, 0.5, 1.0].map(|depth| (40, None, Some(*d), Some(depth)))).collect();
    assert_eq!(r.tasks[1].cells.iter().map(of).collect::<Vec<_>>(), needles);
    assert!(r.tasks[0].cells.iter().all(|c| c.samples == 3 && c.answers == 3 * c.pairs.unwrap()));
    assert!(r.tasks[1].cells.iter().all(|c| c.samples == 3 && c.answers == 3));
    // an untrained model knows nothing: about ln 256 nats
    assert!(r.tasks.iter().flat_map(|t| &t.cells).all(|c| (4.0..8.0).contains(&c.loss.unwrap()) && c.accuracy <= 0.4));
    assert_eq!((r.tasks[0].samples, r.tasks[1].samples), (12, 18));
    assert!(told.windows(2).all(|w| w[0].0 < w[1].0) && told.last().is_some_and(|(n, of)| n == of));
    let names: Vec<String> = r.scalars().into_keys().collect();
    let expected = "mqar mqar.16 mqar.64 mqar.pairs-2 mqar.pairs-2.16 mqar.pairs-2.64 mqar.pairs-4 mqar.pairs-4.16 mqar.pairs-4.64 needle needle.40 \
                    needle.difficulty-1 needle.difficulty-1.40 needle.difficulty-2 needle.difficulty-2.40";
    assert_eq!(names.join(" "), expected.split_whitespace().collect::<Vec<_>>().join(" "));
    // what else is asked changes no cell
    let one = Options { lengths: vec![64], ..options() };
    let again = evaluate(&model, &[Task::Mqar], &one, &mut |_, _| {}).unwrap();
    assert_eq!(again.tasks[0].cells, r.tasks[0].cells[2..]);
    let other = Options { seed: 2, ..one };
    assert_ne!(evaluate(&model, &[Task::Mqar], &other, &mut |_, _| {}).unwrap().tasks[0].cells, again.tasks[0].cells);
    assert!(r.table().contains("difficulty-2") && r.table().contains("75-100%"), "{}", r.table());
}

#[test]
fn pieces_give_what_the_whole_gives() {
    let model = model();
    let s = Settings::default();
    let (length, vocab) = (2 * nn::CHUNK + 70, model.config().vocab_size);
    // labels in each piece
    let mut samples: Vec<Sample> = (0..2)
        .map(|i| {
            let point = Point { length, pairs: None, difficulty: Some(2), depth: Some(0.5) };
            super::super::generate(Task::Needle, &s, vocab, None, &point, 1, i).unwrap()
        })
        .collect();
    for s in &mut samples {
        for at in [7, nn::CHUNK - 1, nn::CHUNK, length - 2] {
            s.labels[at] = (at % vocab) as i64;
        }
    }
    let pieces = read(&model, &samples).unwrap();
    for (s, got) in samples.iter().zip(pieces) {
        assert_eq!(got.len(), 5);
        let tokens = engine::Tensor::from_slice(&s.tokens, &[1, length], &engine::Device::cpu()).unwrap();
        let targets = engine::Tensor::from_slice(&s.labels, &[length], &engine::Device::cpu()).unwrap();
        let whole = model.token_losses(&tokens, &targets, None, None).unwrap().cast(DType::F64).unwrap().to_vec::<f64>().unwrap();
        let whole: Vec<f64> = whole.into_iter().zip(&s.labels).filter(|(_, l)| **l >= 0).map(|(x, _)| x).collect();
        assert!(got.iter().zip(&whole).all(|(a, b)| (a.nll - b).abs() < 2e-4), "{got:?} {whole:?}");
    }
    // and short ones side by side are as each alone
    let short: Vec<Sample> = samples.iter().map(|s| Sample { tokens: s.tokens[..100].to_vec(), labels: s.labels[..100].to_vec() }).collect();
    let both = read(&model, &short).unwrap();
    for (s, got) in short.iter().zip(both) {
        let alone = read(&model, std::slice::from_ref(s)).unwrap().remove(0);
        assert!(got.len() == 1 && (got[0].nll - alone[0].nll).abs() < 1e-5);
    }
}

#[test]
fn an_answer_is_the_likeliest_token() {
    // a model whose output projection is the embedding, and nothing else speaks: hidden states decide
    let model = model();
    let h = model.config().hidden_size;
    let hidden = engine::Tensor::from_vec((0..3 * h).map(|i| ((i * 37 % 101) as f32 - 50.0) / 50.0).collect::<Vec<f32>>(), &[3, h]).unwrap();
    let logits = model.logits(&hidden).unwrap().to_vec::<f32>().unwrap();
    let best = |r: usize| {
        let row = &logits[256 * r..256 * (r + 1)];
        (0..256).max_by(|a, b| row[*a].total_cmp(&row[*b])).unwrap() as i64
    };
    let got = super::super::answers(&model, &hidden, &[best(0), -100, (best(2) + 1) % 256]).unwrap();
    assert_eq!(got.iter().map(|a| a.right).collect::<Vec<_>>(), [true, false]);
    let row = &logits[..256];
    let sum: f64 = row.iter().map(|l| f64::from(*l).exp()).sum();
    assert!((got[0].nll - (sum.ln() - f64::from(row[best(0) as usize]))).abs() < 1e-6);
}

#[test]
fn english_is_read_and_answered() {
    let model = model();
    let prose = Prose::of("Call me Ishmael. Some years ago I went to sea. ").unwrap();
    let o = Options { lengths: vec![700, 1024], depths: Some(2), samples: Some(2), prose: Some(&prose), codec: Some(&Codec::Bytes), ..options() };
    let r = evaluate(&model, &[Task::Niah(1), Task::Niah(3)], &o, &mut |_, _| {}).unwrap();
    assert_eq!(r.tasks.iter().map(|t| t.cells.len()).collect::<Vec<_>>(), [4, 4]);
    assert!(r.tasks.iter().flat_map(|t| &t.cells).all(|c| c.answers == 2 && c.correct == 0 && c.loss.is_none()));
    assert_eq!(r.tasks[1].settings["haystack"], "prose");
}

#[test]
fn what_can_not_be_asked_says_why() {
    let model = model();
    let fails = |task: Task, o: Options, words: &[&str]| {
        let e = evaluate(&model, &[task], &o, &mut |_, _| {}).unwrap_err().to_string();
        assert!(words.iter().all(|w| e.contains(w)), "{e}");
    };
    fails(Task::Needle, Options { lengths: vec![8192], ..options() }, &["8192", "4096", "max_position_embeddings", "--beyond"]);
    fails(Task::Niah(1), options(), &["niah-1", "tokenizer"]);
    fails(Task::Niah(2), Options { codec: Some(&Codec::Bytes), ..options() }, &["niah-2", "--text"]);
    fails(Task::Niah(1), Options { codec: Some(&Codec::Bytes), lengths: vec![200], ..options() }, &["--length 200", "128 tokens take"]);
    fails(Task::Mqar, Options { lengths: vec![63], ..options() }, &["tasks.mqar.length", "even"]);
    fails(Task::Needle, Options { samples: Some(0), ..options() }, &["--samples"]);
    let mut o = options();
    o.settings.mqar.vocab = Some(300);
    fails(Task::Mqar, o, &["tasks.mqar.vocab", "256", "300"]);
    let mut o = options();
    o.settings.needle.filler = Filler::Text;
    fails(Task::Needle, o, &["needle", "--text"]);
    let beyond = Options { lengths: vec![4098], depths: Some(1), samples: Some(1), beyond: true, ..options() };
    assert!(evaluate(&model, &[Task::Needle], &beyond, &mut |_, _| {}).is_ok());
}

#[test]
fn reports_keep_other_tasks_and_put_others_aside() {
    let model = model();
    let tmp = tempfile::tempdir().unwrap();
    let path = tmp.path().join("eval.json");
    let some = |task: Task, seed: u64| evaluate(&model, &[task], &Options { seed, ..options() }, &mut |_, _| {}).unwrap();
    assert_eq!(some(Task::Mqar, 1).write(&path).unwrap(), None);
    assert_eq!(some(Task::Needle, 1).write(&path).unwrap(), None);
    let names = |r: EvalReport| r.tasks.into_iter().map(|t| t.task).collect::<Vec<_>>();
    assert_eq!(names(EvalReport::read(&path).unwrap()), ["mqar", "needle"]);
    some(Task::Mqar, 1).write(&path).unwrap();
    assert_eq!(names(EvalReport::read(&path).unwrap()), ["needle", "mqar"]);
    let aside = some(Task::Mqar, 2).write(&path).unwrap().unwrap();
    assert_eq!(aside, tmp.path().join("eval.seed-1.json"));
    assert_eq!((names(EvalReport::read(&aside).unwrap()).len(), names(EvalReport::read(&path).unwrap()).len()), (2, 1));
    std::fs::write(&path, "{").unwrap();
    assert!(some(Task::Mqar, 2).write(&path).unwrap_err().to_string().contains("--out"));
}
