//! The paper's models: their sizes, and what each of its variants adds (2505.06708, table 1).

use super::*;
use nn::{GateActivation, GateGranularity, GateOp, GatePosition};

#[test]
fn every_preset_is_one_that_can_be_run() {
    for name in NAMES {
        let c = by_name(name).unwrap();
        assert_eq!(&c.name, name);
        c.validate().unwrap();
    }
    assert!(by_name("qwen3-15b").unwrap_err().to_string().contains("did you mean `qwen3-15a2b`"));
}

#[test]
fn sizes_are_those_that_follow_from_table_7() {
    let table = 151_936 * 2048;
    // per layer: q, k, v, o; router; experts; norms of the layer, of queries and of keys
    let attention = 2048 * (32 + 2 * 4) * 128 + 32 * 128 * 2048 + 2 * 128;
    let layer = |experts: usize| attention + 128 * 2048 + experts * 3 * 2048 * 768 + 2 * 2048;
    let (total, active) = qwen3_15a2b().model.parameters();
    assert_eq!(total, 24 * layer(128) + 2 * table + 2048);
    assert_eq!(active, 24 * layer(8) + 2 * table + 2048);
    // "15B" is the total without embedding and output projection; the paper's 2.54 B active parameters do not follow from its table 7, whose sizes make 1.99 B
    assert_eq!((total, active), (15_577_227_264, 1_987_682_304));
    assert_eq!(((total - 2 * table) as f64 / 1e8).round() / 10.0, 15.0);
    // the first is the published Qwen3-1.7B
    assert_eq!(qwen3_1_7b_28l().model.parameters(), (1_720_574_976, 1_720_574_976));
    let layer = 1536 * (16 + 2 * 8) * 128 + 16 * 128 * 1536 + 3 * 1536 * 4608 + 2 * 1536 + 2 * 128;
    assert_eq!(qwen3_1_7b_48l().model.parameters().0, 48 * layer + 151_936 * 1536 + 1536);
}

#[test]
fn sizes_of_the_recurrent_models_are_those_of_their_names() {
    // embedding (tied), last norm; norms, feed-forward; and the mixers, written out
    let rest = |h: usize, layers: usize, inner: usize| 32_000 * h + h + layers * (2 * h + 3 * h * inner);
    let delta = |h: usize, gates: usize| {
        let (k, v, heads) = (h * 3 / 4, h * 3 / 2, 9);
        h * (2 * k + 2 * v + gates * heads) + 4 * (2 * k + v) + if gates == 2 { 2 * heads } else { 0 } + v / heads + v * h
    };
    let mamba = |h: usize| {
        let (inner, n, heads) = (2 * h, 128, 2 * h / 64);
        h * (2 * inner + 2 * n + heads) + 5 * (inner + 2 * n) + 3 * heads + inner + inner * h
    };
    let softmax = |h: usize| 4 * h * h;
    let (a, b, c) = (1536, 2400, 2304);
    // the whole, and what of it is not embedding, which is what the papers' "0.4B" is nearer to
    let rows = [
        ("gated-deltanet-0.4b", rest(a, 11, 6144) + 11 * delta(a, 2), 0.517, 0.468),
        ("gated-deltanet-1.3b", rest(b, 16, 5888) + 16 * delta(b, 2), 1.309, 1.232),
        ("gated-deltanet-h1-0.4b", rest(a, 12, 6144) + 6 * (delta(a, 2) + softmax(a)), 0.531, 0.482),
        ("gated-deltanet-h1-1.3b", rest(c, 18, 6144) + 9 * (delta(c, 2) + softmax(c)), 1.317, 1.243),
        ("gated-deltanet-h2-0.4b", rest(a, 12, 6144) + 4 * (mamba(a) + delta(a, 2) + softmax(a)), 0.542, 0.493),
        ("gated-deltanet-h2-1.3b", rest(c, 18, 6144) + 6 * (mamba(c) + delta(c, 2) + softmax(c)), 1.353, 1.279),
        ("mamba2-0.4b", rest(a, 11, 6144) + 11 * mamba(a), 0.522, 0.473),
        ("mamba2-1.3b", rest(b, 16, 5888) + 16 * mamba(b), 1.321, 1.245),
        ("delta-net-0.4b", rest(a, 11, 6144) + 11 * delta(a, 1), 0.517, 0.468),
        ("delta-net-1.3b", rest(b, 16, 5888) + 16 * delta(b, 1), 1.309, 1.232),
    ];
    for (name, want, whole, inside) in rows {
        let m = by_name(name).unwrap().model;
        let (n, active) = m.parameters();
        println!("{name}: {n}, {} without the embedding", n - 32_000 * m.hidden_size);
        assert_eq!((n, active), (want, want), "{name}");
        let billions = |n: usize| (n as f64 / 1e6).round() / 1e3;
        assert_eq!((billions(n), billions(n - 32_000 * m.hidden_size)), (whole, inside), "{name}");
    }
    // heads of the authors' code: keys of 128, 200 or 192 numbers, values of twice as many
    let heads = |name: &str| by_name(name).map(|c| (c.model.linear_key_head_dim, c.model.linear_value_head_dim)).unwrap();
    assert_eq!([heads("gated-deltanet-0.4b"), heads("gated-deltanet-1.3b"), heads("gated-deltanet-h1-1.3b")], [(128, 256), (200, 400), (192, 384)]);
    assert!(by_name("mamba2-2.7b").is_err());
}

#[test]
fn what_variants_add_is_what_table_1_says() {
    let base = qwen3_15a2b().model;
    let gate = AttentionGate::default();
    let headwise = AttentionGate { granularity: GateGranularity::Headwise, ..gate };
    let shared = AttentionGate { shared: true, ..gate };
    let silu = AttentionGate { activation: GateActivation::Silu, ..gate };
    let add = AttentionGate { op: GateOp::Add, ..silu };
    let table = AttentionGate { input: false, ..gate };
    let with = |set: &dyn Fn(&mut ModelConfig)| {
        let mut c = base.clone();
        set(&mut c);
        c.validate().unwrap();
        c
    };
    let added = |c: &ModelConfig| c.parameters().0 - base.parameters().0;
    // the paper's row, the configuration, what it adds, and the figure in its table, in millions
    let rows: [(usize, ModelConfig, usize, f64); 14] = [
        (2, with(&|c| c.num_key_value_heads = 8), 24 * 2 * 2048 * 4 * 128, 50.0),
        (3, with(&|c| c.num_attention_heads = 48), 24 * 2 * 2048 * 16 * 128, 201.0),
        (5, with(&|c| c.attention_gate = gate), 24 * 2048 * 4096, 201.0),
        (6, with(&|c| c.value_gate = gate), 24 * 2048 * 512, 25.0),
        (7, with(&|c| c.key_gate = gate), 24 * 2048 * 512, 25.0),
        (8, with(&|c| c.query_gate = gate), 24 * 2048 * 4096, 201.0),
        (9, with(&|c| c.dense_gate = gate), 24 * 2048 * 2048, 100.0),
        (10, with(&|c| c.attention_gate = headwise), 24 * 2048 * 32, 1.6),
        (11, with(&|c| c.value_gate = headwise), 24 * 2048 * 4, 0.2),
        (12, with(&|c| c.attention_gate = shared), 24 * 2048 * 4096, 201.0),
        (13, with(&|c| c.value_gate = shared), 24 * 2048 * 512, 25.0),
        (14, with(&|c| c.attention_gate = add), 24 * 2048 * 4096, 201.0),
        (15, with(&|c| c.attention_gate = silu), 24 * 2048 * 4096, 201.0),
        // in table 4 alone, without a figure: one number per head and dimension
        (0, with(&|c| c.attention_gate = table), 24 * 32 * 128, 0.1),
    ];
    for (row, c, want, figure) in rows {
        assert_eq!(added(&c), want, "row {row}");
        // the table's figures are rounded or cut off
        let unit = if figure < 10.0 { 0.1 } else { 1.0 };
        assert!((want as f64 / 1e6 - figure).abs() < unit, "row {row}: {want} against {figure} M");
        let gates: usize = GatePosition::ALL.into_iter().map(|at| c.gate_parameters(at)).sum();
        assert_eq!(gates, if row == 2 || row == 3 { 0 } else { want }, "row {row}");
    }
    // row 4: four experts of table 7's size and their rows of the router are 453 M, where table 1 says 400
    assert_eq!(added(&with(&|c| c.num_experts = 132)), 24 * 4 * (3 * 2048 * 768 + 2048));
    // tables 2 and 3: norms, and SiLU alone
    assert_eq!(added(&with(&|c| c.sdpa_norm = true)), 24 * 128);
    assert_eq!(added(&with(&|c| c.sdpa_silu = true)), 0);
    assert_eq!(added(&with(&|c| c.sandwich_norm = true)), 24 * 2 * 2048);
    // table 6: each further expert is a projection of all values (and keys), and each has a row of the router for each head
    let switch = |experts, top_k, keys| added(&with(&|c| c.switch_heads = nn::SwitchHeads { experts, top_k, keys }));
    assert_eq!(switch(1, 1, false), 24 * 2048 * 4);
    assert_eq!(switch(4, 4, false), 24 * 2048 * (3 * 512 + 4 * 4));
    assert_eq!(switch(8, 2, false), 24 * 2048 * (7 * 512 + 8 * 4));
    assert_eq!(switch(4, 4, true), 24 * 2048 * (2 * 3 * 512 + 4 * 4));
    assert_eq!(switch(8, 8, true), 24 * 2048 * (2 * 7 * 512 + 8 * 4));
    // two gates add what both do
    assert_eq!(added(&with(&|c| (c.attention_gate, c.value_gate) = (gate, headwise))), 24 * 2048 * (4096 + 4));
}
