use super::proto::{Field, Fields};
use super::*;
use crate::measure::Histogram;

/// Vectors of RFC 3720, appendix B.4, and the check value of the CRC catalogue.
#[test]
fn checksums() {
    let ascending: Vec<u8> = (0..32).collect();
    let descending: Vec<u8> = (0..32).rev().collect();
    for (bytes, crc) in
        [(&[0; 32][..], 0x8a91_36aa), (&[0xff; 32], 0x62a8_ab43), (&ascending, 0x46dd_794e), (&descending, 0x113f_db5c), (b"123456789", 0xe306_9283)]
    {
        assert_eq!(record::crc32c(bytes), crc, "{bytes:?}");
    }
    // what TensorFlow writes in front of a record of 24 bytes
    assert_eq!(record::masked(record::crc32c(&24u64.to_le_bytes())).to_le_bytes(), [0xa3, 0x7f, 0x4b, 0x22]);
}

fn near(a: u64, b: f32) -> bool {
    f32::from_bits(a as u32) == b
}

/// Tags and steps with their values in the run's only event file that is not empty; histograms have none.
fn all(run: &Path) -> Vec<(u64, String, Option<u64>)> {
    let mut files = files(&run.join(FOLDER)).unwrap();
    files.retain(|f| length(f) > 0);
    assert_eq!(files.len(), 1, "{files:?}");
    let (bytes, mut out) = (fs::read(&files[0]).unwrap(), vec![]);
    let mut rest = &bytes[..];
    while let Some(data) = record::next(&mut rest).unwrap() {
        let step = proto::read(&data).step;
        let summaries = Fields(&data).filter_map(|f| if let (5, Field::Bytes(b)) = f { Some(b) } else { None });
        for value in summaries.flat_map(Fields) {
            let (1, Field::Bytes(value)) = value else { panic!("{value:?}") };
            let (mut tag, mut number) = (String::new(), None);
            for f in Fields(value) {
                match f {
                    (1, Field::Bytes(b)) => tag = String::from_utf8(b.to_vec()).unwrap(),
                    (2, Field::Number(n)) => number = Some(n),
                    _ => {}
                }
            }
            out.push((step, tag, number));
        }
    }
    assert!(rest.is_empty(), "{} bytes are no record", rest.len());
    out
}

fn write(events: &mut Events, step: u64) {
    events
        .write(step, &[("loss", (step as f64).into()), ("sample", "text".into())], &Scalars::from([("blocks.0.attn.gate_mean".into(), 0.5)]))
        .unwrap();
}

#[test]
fn tags_are_grouped() {
    for (name, closing, expected) in [
        ("loss", false, "train/loss"),
        ("held_out_bits", false, "eval/held_out_bits"),
        ("held_out_bits", true, "final/held_out_bits"),
        ("blocks.3.mlp.router_dead", false, "blocks.3.mlp/router_dead"),
        ("norm.grad_norm", false, "norm/grad_norm"),
    ] {
        assert_eq!(tag(name, closing), expected);
    }
}

#[test]
fn going_on_doubles_nothing() {
    let tmp = tempfile::tempdir().unwrap();
    let mut events = Events::open(tmp.path(), 0).unwrap();
    let d = Distribution {
        name: "blocks.0.attn.gate".into(),
        min: 0.1,
        max: 0.9,
        sum: 1.0,
        sum_squares: 0.82,
        bins: Histogram { from: 0.0, to: 1.0, counts: vec![1, 1] },
    };
    for step in 1..=5 {
        write(&mut events, step);
        if step % 2 == 0 {
            events.histograms(step, std::slice::from_ref(&d)).unwrap();
        }
    }
    events.write(3, &[("final", true.into()), ("held_out_bits", 1.5.into())], &Scalars::new()).unwrap();
    let seen = all(tmp.path());
    assert_eq!(seen.len(), 5 * 2 + 2 + 1);
    assert!(seen[0].1 == "train/loss" && near(seen[0].2.unwrap(), 1.0));
    assert!(seen.iter().any(|s| s.1 == "final/held_out_bits"));
    // a process that was killed in the middle of a record, and a file of somebody else's
    let path = events.path.clone();
    let mut torn = fs::read(&path).unwrap();
    torn.truncate(torn.len() - 3);
    fs::write(&path, torn).unwrap();
    fs::write(tmp.path().join(FOLDER).join("notes.txt"), "mine").unwrap();
    let mut events = Events::open(tmp.path(), 3).unwrap();
    assert!(events.path > path, "TensorBoard reads files in the order of their names");
    write(&mut events, 4);
    let steps: Vec<u64> = all(tmp.path()).iter().filter(|s| s.1 == "train/loss").map(|s| s.0).collect();
    assert_eq!(steps, [1, 2, 3, 4]);
    assert!(all(tmp.path()).iter().all(|s| !s.1.starts_with(FINAL)));
    assert_eq!(all(tmp.path()).iter().filter(|s| s.1 == "blocks.0.attn/gate").map(|s| s.0).collect::<Vec<_>>(), [2]);
    // whoever has read the old file is told to forget it
    let bytes = fs::read(&events.path).unwrap();
    let mut rest = &bytes[..];
    record::next(&mut rest).unwrap().unwrap();
    assert!(Fields(&record::next(&mut rest).unwrap().unwrap()).any(|f| f == (7, Field::Bytes(&[8, 1]))));
    assert!(tmp.path().join(FOLDER).join("notes.txt").is_file());
    assert_eq!(files(&tmp.path().join(FOLDER)).unwrap().len(), 2, "the old one is empty");
    // a run that begins anew
    Events::open(tmp.path(), 0).unwrap();
    assert_eq!(all(tmp.path()), []);
    assert_eq!(files(&tmp.path().join(FOLDER)).unwrap().len(), 2, "what was empty is gone");
}

#[test]
fn damage_ends_a_file() {
    let mut bytes = vec![];
    record::append(&mut bytes, b"one");
    let first = bytes.len();
    record::append(&mut bytes, b"two");
    for (at, left) in [(first, 1), (first + 13, 1), (first + 16, 1), (0, 0), (7, 0), (13, 0)] {
        let mut broken = bytes.clone();
        broken[at] ^= 1;
        let mut rest = &broken[..];
        assert_eq!(std::iter::from_fn(|| record::next(&mut rest).unwrap()).count(), left, "byte {at}");
    }
    assert!(Fields(&[0x0f, 1]).next().is_none() && Fields(&[0x0a, 0xff, 0xff]).next().is_none() && Fields(&[0x80; 11]).next().is_none());
}
