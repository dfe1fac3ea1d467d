//! Folders and tokenizers with something wrong in them: refused with an error or opened, without a panic, in a little time and memory.
//!
//! The cases are the same everywhere. `TIDEGATE_FUZZ_SECONDS=3600` runs others for as long, each time others; `TIDEGATE_FUZZ_CASE=tokenizer:123` runs one
//! case alone.

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::Mutex;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use tidegate_tests::fuzz::memory::{Counting, live, most};
use tidegate_tests::fuzz::{Files, Outcome, Place, Random, folder, folders, mutate_files, mutate_tokenizer, seed_tokenizer, tokenizer};

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Bytes that an input may take: so many, and so many for each of its own.
const MEMORY: usize = 48 << 20;
const MEMORY_PER_BYTE: usize = 64;
/// Bytes that all inputs together may leave behind, whatever their number.
const KEPT: usize = 4 << 20;
/// An input that takes more seconds hangs, even on a machine with other things to do.
const SECONDS: u32 = 30;

/// The case that runs, and for how many seconds it was seen to.
static NOW: Mutex<Option<(String, u32)>> = Mutex::new(None);

/// Ends the process when a case hangs. Seconds are those that this process had: one that was stopped for a while does not hang.
fn watch() {
    std::thread::spawn(|| {
        loop {
            std::thread::sleep(Duration::from_secs(1));
            let mut now = NOW.lock().unwrap_or_else(|e| e.into_inner());
            if let Some((name, seen)) = now.as_mut() {
                *seen += 1;
                if *seen > SECONDS {
                    eprintln!("{name} hangs: TIDEGATE_FUZZ_CASE={name} runs it alone");
                    std::process::abort();
                }
            }
        }
    });
}

struct Report {
    taken: usize,
    refused: BTreeMap<String, usize>,
    wrong: Vec<String>,
    memory: (usize, String),
    time: (Duration, String),
}

impl Report {
    fn case(&mut self, kind: &str, case: u64, bytes: usize, run: impl FnOnce() -> Outcome) {
        let name = format!("{kind}:{case}");
        let began = Instant::now();
        *NOW.lock().unwrap() = Some((name.clone(), 0));
        let (outcome, memory) = most(|| catch_unwind(AssertUnwindSafe(run)));
        *NOW.lock().unwrap() = None;
        if memory > MEMORY + MEMORY_PER_BYTE * bytes {
            self.wrong.push(format!("{name} of {bytes} bytes took {} MB of memory", memory >> 20));
        }
        match outcome {
            Ok(Outcome::Taken) => self.taken += 1,
            // what comes after names and numbers is the kind of a message
            Ok(Outcome::Refused(why)) => {
                let why = why.rsplit("/in/").next().unwrap_or_default().split('`').step_by(2).collect::<Vec<_>>().join("`");
                *self.refused.entry(why.chars().filter(|c| !c.is_ascii_digit()).take(90).collect()).or_default() += 1;
            }
            Err(e) => {
                let said = e.downcast_ref::<String>().cloned().or(e.downcast_ref::<&str>().map(|s| s.to_string()));
                self.wrong.push(format!("{name} panics: {}", said.unwrap_or_default()));
            }
        }
        self.memory = self.memory.clone().max((memory, name.clone()));
        self.time = self.time.clone().max((began.elapsed(), name));
    }
}

#[test]
fn bad_files_are_opened_or_refused() {
    let (place, seeds) = (Place::new(), folders());
    for seed in &seeds {
        assert_eq!(folder(&place, seed), Outcome::Taken, "a seed");
    }
    let mut report = Report { taken: 0, refused: BTreeMap::new(), wrong: vec![], memory: (0, String::new()), time: (Duration::ZERO, String::new()) };
    let only = std::env::var("TIDEGATE_FUZZ_CASE").ok();
    let seconds =
        std::env::var("TIDEGATE_FUZZ_SECONDS").ok().map(|s| Duration::from_secs(s.parse().expect("TIDEGATE_FUZZ_SECONDS is a whole number")));
    watch();
    let began = Instant::now();
    let (mut folders_done, mut tokenizers_done, mut settled) = (0, 0, None);
    let first = seconds.map_or(0, |_| SystemTime::now().duration_since(UNIX_EPOCH).map_or(1, |d| d.as_secs()) << 24);
    let folder_case = |report: &mut Report, case: u64| {
        let mut r = Random(case);
        // small folders more often
        let seed = if r.once_in(8) { r.pick(&seeds) } else { r.pick(&seeds[..4]) };
        let mut files: Files = seed.clone();
        mutate_files(&mut r, &mut files);
        let bytes = files.iter().map(|(_, b)| b.as_ref().map_or(0, Vec::len)).sum();
        report.case("folder", case, bytes, || folder(&place, &files));
    };
    let tokenizer_case = |report: &mut Report, case: u64| {
        let mut r = Random(case ^ (1 << 60));
        let mut json = seed_tokenizer(&mut r);
        if !r.once_in(10) {
            json = mutate_tokenizer(&mut r, json);
        }
        if std::env::var("TIDEGATE_FUZZ_CASE").is_ok() {
            println!("{}", String::from_utf8_lossy(&json));
        }
        // on a thread of its own: tokenizers 0.23.2 keeps something of each byte-pair tokenizer for as long as the thread that encoded with it
        let run = || std::thread::scope(|s| s.spawn(|| tokenizer(&json)).join().unwrap_or_else(|e| resume_unwind(e)));
        report.case("tokenizer", case, json.len(), run);
    };
    if let Some(only) = only {
        let (kind, case) = only.split_once(':').expect("TIDEGATE_FUZZ_CASE is folder:N or tokenizer:N");
        let case = case.parse().expect("the number of a case");
        if kind == "folder" { folder_case(&mut report, case) } else { tokenizer_case(&mut report, case) }
    } else {
        while seconds.map_or(folders_done < FOLDERS, |s| began.elapsed() < s) && report.wrong.len() < 20 {
            folder_case(&mut report, first + folders_done);
            folders_done += 1;
            if folders_done == FOLDERS / 4 {
                settled = Some(live());
            }
            for _ in 0..TOKENIZERS / FOLDERS {
                tokenizer_case(&mut report, first + tokenizers_done);
                tokenizers_done += 1;
            }
        }
    }
    let kept = settled.map_or(0, |then| live().saturating_sub(then));
    println!("{} KB more are allocated than after the first {} folders", kept >> 10, FOLDERS / 4);
    println!("{folders_done} folders and {tokenizers_done} tokenizers in {:.0} s: {} taken, refused:", began.elapsed().as_secs_f64(), report.taken);
    report.refused.iter().for_each(|(why, n)| println!("{n:>8}  {why}"));
    println!("most memory {} MB in {}, most time {:.2} s in {}", report.memory.0 >> 20, report.memory.1, report.time.0.as_secs_f64(), report.time.1);
    assert!(kept <= KEPT, "{kept} bytes are kept of what was opened and dropped");
    assert!(report.wrong.is_empty(), "run one alone by TIDEGATE_FUZZ_CASE=NAME:\n{}", report.wrong.join("\n"));
}

/// Cases of each kind: about 15 seconds.
const FOLDERS: u64 = 8000;
const TOKENIZERS: u64 = 24_000;
