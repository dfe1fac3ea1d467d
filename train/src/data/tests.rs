use super::*;
use std::path::Path;

fn read_all(c: &Corpus) -> Vec<u32> {
    let mut out = vec![];
    c.read(0..c.len(), &mut out);
    out
}

fn message(path: &Path) -> String {
    Corpus::open(path, None).unwrap_err().to_string()
}

#[test]
fn text_file_folder_and_jsonl() {
    let dir = tempfile::tempdir().unwrap();
    let p = dir.path();
    std::fs::write(p.join("b.txt"), "bcd").unwrap();
    std::fs::write(p.join("a.md"), "a").unwrap();
    std::fs::write(p.join("c.png"), [0xff, 0xfe]).unwrap();
    std::fs::create_dir(p.join("z")).unwrap();
    std::fs::write(p.join("z/d.jsonl"), "{\"text\":\"ef\",\"id\":1}\n\n{\"text\":\"é\"}\n").unwrap();
    let c = Corpus::open(p, None).unwrap();
    let bytes: Vec<u8> = read_all(&c).iter().map(|&t| t as u8).collect();
    assert_eq!(bytes, "abcdefé".as_bytes());
    assert_eq!(c.document_starts(0..8, &[0; 8]), [1, 4, 6]);
    assert_eq!(c.document_starts(1..4, &[0; 3]), [0usize; 0]);
    assert_eq!(c.document_starts(2..7, &[0; 5]), [4, 6]);
}

#[test]
fn bad_text_says_where() {
    let dir = tempfile::tempdir().unwrap();
    let p = dir.path().join("x.txt");
    assert!(message(&p).contains("not found"));
    std::fs::write(&p, "").unwrap();
    assert!(message(&p).contains("empty"));
    std::fs::write(&p, b"abc\xffdef").unwrap();
    let m = message(&p);
    assert!(m.contains("x.txt") && m.contains("byte offset 3") && m.contains("UTF-8"), "{m}");
    assert!(message(dir.path()).contains("offset 3"));
    let e = tempfile::tempdir().unwrap();
    assert!(message(e.path()).contains("no text"));
    let j = dir.path().join("y.jsonl");
    std::fs::write(&j, "{\"text\":\"a\"}\n{\"txt\":1}\n").unwrap();
    let m = message(&j);
    assert!(m.contains("line 2") && m.contains("text"), "{m}");
}

#[test]
fn large_files_are_mapped_and_read_as_one_text() {
    let dir = tempfile::tempdir().unwrap();
    let big = |c: &str| format!("{c}é").repeat(load::MAPPED as usize / 3 + 1);
    let documents = [big("a"), "small".into(), "tiny".into(), big("b"), big("c")];
    for (i, d) in documents.iter().enumerate() {
        std::fs::write(dir.path().join(format!("{i}.txt")), d).unwrap();
    }
    let c = Corpus::open(dir.path(), None).unwrap();
    let Store::Text(text) = &c.store else { panic!() };
    let mapped: Vec<bool> = text.pieces().map(|p| matches!(p, Bytes::Mapped(_))).collect();
    assert_eq!(mapped, [true, false, true, true], "the two small files are one piece in memory");
    let in_memory = Corpus::from_documents(&documents);
    assert_eq!(c.len(), in_memory.len());
    let n = documents[0].len();
    for range in [0..c.len(), n - 3..n + 12, n..n + 5, n + 9..n + 9, c.len() - 1..c.len(), n + 7..2 * n + 20] {
        let read = |c: &Corpus| {
            let mut out = vec![];
            c.read(range.clone(), &mut out);
            (c.document_starts(range.clone(), &out), out)
        };
        assert!(read(&c) == read(&in_memory), "{range:?}");
    }
    assert_eq!(c.fingerprint(), in_memory.fingerprint());
    let file = dir.path().join("3.txt");
    assert!(matches!(&Corpus::open(&file, None).unwrap().store, Store::Text(t) if t.pieces().all(|p| matches!(p, Bytes::Mapped(_)))));
    let mut bytes = documents[3].clone().into_bytes();
    bytes[n - 2] = 0xff;
    std::fs::write(&file, bytes).unwrap();
    let m = message(dir.path());
    assert!(m.contains("3.txt") && m.contains(&format!("byte offset {}", n - 2)), "{m}");
}

#[test]
fn fingerprints_tell_texts_apart() {
    let of = |d: &[&str]| Corpus::from_documents(d).fingerprint();
    assert_eq!(of(&["abc", "def"]), of(&["abc", "", "def"]));
    assert_ne!(of(&["abc", "def"]), of(&["abcdef"]), "documents count");
    assert_ne!(of(&["abcdef"]), of(&["abcdeg"]));
    assert_ne!(of(&["abcdef"]), of(&["abcde"]));
}

#[test]
fn shards() {
    let dir = tempfile::tempdir().unwrap();
    let p = dir.path().join("x.bin");
    let tokens = [5u32, 9, 300, 9, 1, 2];
    write_shard(&p, &tokens, 400, Some(9)).unwrap();
    let c = Corpus::open(&p, None).unwrap();
    assert_eq!(read_all(&c), tokens);
    assert!(!c.is_bytes());
    assert_eq!(c.document_starts(0..6, &tokens), [2, 4]);
    let wide = [70_000u32, 1, 2];
    write_shard(&p, &wide, 0, None).unwrap();
    assert_eq!(read_all(&Corpus::open(&p, None).unwrap()), wide);
    // Lying and truncated headers.
    let mut bytes = std::fs::read(&p).unwrap();
    bytes[8..12].copy_from_slice(&u32::MAX.to_le_bytes());
    std::fs::write(&p, &bytes).unwrap();
    assert!(message(&p).contains("4294967295"));
    std::fs::write(&p, &bytes[..100]).unwrap();
    assert!(message(&p).contains("truncated"));
    // nanoGPT: bare 16-bit tokens.
    std::fs::write(&p, [1u8, 0, 44, 1, 7, 0]).unwrap();
    assert_eq!(read_all(&Corpus::open(&p, None).unwrap()), [1, 300, 7]);
    std::fs::write(&p, [1u8, 0, 44]).unwrap();
    assert!(message(&p).contains("truncated"));
    std::fs::write(&p, []).unwrap();
    assert!(message(&p).contains("empty"));
}

#[test]
fn sampler_covers_each_epoch_and_shifts_the_next() {
    let text: String = (0..1000).map(|i| char::from(b'a' + (i % 26) as u8)).collect();
    let c = Corpus::from_documents(&[text]);
    let (train, held) = c.split(0.1);
    assert_eq!((train.clone(), held), (0..900, 900..1000));
    let s = Sampler::new(&c, train.clone(), 1, 3, 16, 2, Packing::Windows).unwrap();
    assert_eq!(s.tokens_per_step(), 96);
    let n = s.windows_per_epoch();
    let flat = |i: u64| s.window(i / 6, i % 6 / 3, i % 3);
    let mut offsets = std::collections::HashSet::new();
    for epoch in 0..20 {
        let mut seen = vec![0; 900];
        for i in 0..n {
            let w = flat(epoch * n + i);
            assert!(w.end < train.end, "the target of the last token is still training text");
            w.for_each(|t| seen[t] += 1);
        }
        assert!(seen.iter().all(|&c| c <= 1));
        assert!(seen.iter().filter(|&&c| c == 0).count() <= 32);
        offsets.insert(seen.iter().position(|&c| c == 1));
    }
    assert!(offsets.len() > 8);
    let b = s.batch(&c, 4, 1);
    assert_eq!(b, s.batch(&c, 4, 1));
    assert_ne!(b, s.batch(&c, 4, 0));
    assert_eq!((b.rows, b.time, b.tokens.len(), b.targets.len()), (3, 16, 48, 48));
    assert!(b.tokens[1..16].iter().map(|t| i64::from(*t)).eq(b.targets[..15].iter().copied()));
    assert!(Sampler::new(&c, 0..16, 1, 3, 16, 2, Packing::Windows).unwrap_err().to_string().contains("data.seq_len"));
    let tight = Sampler::new(&c, 0..17, 1, 1, 16, 1, Packing::Windows).unwrap();
    assert_eq!(tight.window(9, 0, 0), 0..16);
}

#[test]
fn packed_rows_restart_at_documents() {
    let c = Corpus::from_documents(&["abcdef", "ghij", "klmnopqrstuvwxyz"]);
    let b = super::sampler::packed(&c, &[3..9, 8..14]);
    assert_eq!((b.rows, b.time), (1, 12));
    assert_eq!(b.cu_seqlens.unwrap(), [0, 3, 6, 8, 12]);
    assert_eq!(b.tokens[0], u32::from(b'd'));
    assert_eq!(b.targets[11], i64::from(b'o'));
}

#[test]
fn held_out_bytes_are_scored_once() {
    let c = Corpus::from_documents(&["x".repeat(137)]);
    for (range, first) in [(100..137, 100), (0..137, 1)] {
        for (rows, time) in [(1, 1), (2, 8), (4, 7), (3, 64)] {
            let mut windows = EvalWindows::new(range.clone(), rows, time, 0, Packing::Windows);
            let mut scored = 0;
            while let Some(b) = windows.next_batch(&c) {
                assert_eq!(b.targets.len(), b.rows * b.time);
                scored += b.targets.len();
            }
            assert_eq!(scored, range.end - first);
        }
    }
    let mut all = EvalWindows::new(100..137, 2, 8, usize::MAX, Packing::Windows);
    assert_eq!(std::iter::from_fn(|| all.next_batch(&c)).map(|b| b.targets.len()).sum::<usize>(), 37);
    let mut few = EvalWindows::new(100..137, 2, 8, 20, Packing::Windows);
    let mut n = 0;
    while let Some(b) = few.next_batch(&c) {
        n += b.targets.len();
    }
    assert_eq!(n, 20);
}

#[test]
fn moby_dick_is_inside() {
    let c = Corpus::open(Path::new(MOBY_DICK_PATH), None).unwrap();
    assert!(c.is_moby_dick());
    assert_eq!(c.len(), 1_204_997);
}
