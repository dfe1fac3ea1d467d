use super::*;

#[test]
fn what_is_not_finite_is_null_and_nothing_is_left_out_unsaid() {
    let tmp = tempfile::tempdir().unwrap();
    let path = tmp.path().join(FILE);
    let m = Measures {
        format: FORMAT,
        loss: f64::NAN,
        bits_per_byte: Some(2.5),
        delta: vec![Delta { layer: 1, half_life: vec![f64::INFINITY, 4.0, 8.0], ..Default::default() }],
        ..Default::default()
    };
    m.write(&path).unwrap();
    let text = std::fs::read_to_string(&path).unwrap();
    assert!(text.contains("\"loss\": null") && !text.contains("gates") && !text.contains("attention\""), "{text}");
    let back = Measures::read(&path).unwrap();
    assert!(back.loss.is_nan() && back.delta[0].half_life[0].is_nan());
    assert_eq!(back.delta[0].half_life[1..], [4.0, 8.0]);
    let s = back.scalars();
    assert!(!s.contains_key("loss") && s["bits_per_byte"] == 2.5 && s["half_life"] == 6.0, "{s:?}");

    for (text, said) in [("{", "no file of measures"), ("{\"format\": 2}", "no file of measures")] {
        std::fs::write(&path, text).unwrap();
        let e = Measures::read(&path).unwrap_err().to_string();
        assert!(e.contains(said) && e.contains("tidegate measure"), "{e}");
    }
    Measures { format: 7, ..m }.write(&path).unwrap();
    assert!(Measures::read(&path).unwrap_err().to_string().contains("its format is 7"));
}
