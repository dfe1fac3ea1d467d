//! The fused ops at the shapes that they are judged at, with what each costs at least.

use engine::{DType, Device, Result, Tensor};
use ops::adamw::{AdamWMany, adamw_many};
use ops::delta_rule::{DeltaRule, DeltaRuleInputs, delta_rule};
use ops::gated_sdpa::{Attention, Gate, gated_sdpa};
use ops::linear_cross_entropy::linear_cross_entropy;
use ops::moe::{Moe, moe};
use ops::rms_norm::rms_norm;
use ops::rope::{Positions, rope};
use ops::short_conv::short_conv;
use ops::swiglu::swiglu;

/// What can be timed, in the order of the table.
pub(super) const NAMES: &[&str] = &["gated_sdpa", "delta_rule", "short_conv", "rms_norm", "rope", "swiglu", "moe", "linear_cross_entropy", "adamw"];

/// How much work a device is given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Scale {
    /// For a GPU: the shapes at which published kernels are measured, or those of the models in `benches/configs`.
    Large,
    /// For a CPU: all together within a minute.
    Small,
    /// For the emulator.
    Tiny,
}

/// Operations and bytes.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Cost {
    /// Floating-point operations that the mathematics needs; 0 where memory is what counts.
    pub flops: f64,
    /// Bytes: inputs read once, outputs written once.
    pub bytes: f64,
}

/// Makes inputs.
pub(super) struct Maker<'a> {
    pub device: &'a Device,
    pub dtype: DType,
}

/// An op with its inputs, ready to run.
pub(super) struct Case {
    pub inputs: Vec<Tensor>,
    pub run: Box<dyn Fn(&[Tensor]) -> Result<Tensor>>,
    pub forward: Cost,
    /// Forward and backward; none for what has no backward.
    pub both: Option<Cost>,
}

/// A case that is not made yet: its inputs may take gigabytes.
pub(super) struct Spec {
    pub op: &'static str,
    pub shape: String,
    pub make: Box<dyn Fn(&Maker) -> Result<Case>>,
}

impl Maker<'_> {
    /// Normal numbers. Large tensors repeat a million of them: drawing each would take longer than the bench.
    fn randn(&self, shape: &[usize], dtype: DType, stream: u64) -> Result<Tensor> {
        const DRAWN: usize = 1 << 20;
        let n: usize = shape.iter().product();
        let some = Tensor::randn(&[n.min(DRAWN)], DType::F32, self.device, 1, stream)?.cast(dtype)?;
        if n <= DRAWN {
            return some.reshape(shape);
        }
        let times = n.div_ceil(DRAWN);
        let all = some.reshape(&[1, DRAWN])?.expand(&[times, DRAWN])?.contiguous()?;
        all.reshape(&[times * DRAWN])?.narrow(0, 0, n)?.contiguous()?.reshape(shape)
    }
    fn x(&self, shape: &[usize], stream: u64) -> Result<Tensor> {
        self.randn(shape, self.dtype, stream)
    }
    /// Bytes of an element.
    fn size(&self) -> f64 {
        self.dtype.size() as f64
    }
}

/// Elements that the forward reads and writes, and those that the backward does: what it reads again, the output's gradient, the inputs' gradients.
fn case(m: &Maker, inputs: Vec<Tensor>, flops: [f64; 2], elements: [usize; 2], run: impl Fn(&[Tensor]) -> Result<Tensor> + 'static) -> Case {
    let bytes = elements.map(|n| n as f64 * m.size());
    let forward = Cost { flops: flops[0], bytes: bytes[0] };
    Case { inputs, run: Box::new(run), forward, both: Some(Cost { flops: flops[0] + flops[1], bytes: bytes[0] + bytes[1] }) }
}

fn spec(op: &'static str, shape: String, make: impl Fn(&Maker) -> Result<Case> + 'static) -> Spec {
    Spec { op, shape, make: Box::new(make) }
}

/// Causal. Two products forward and five backward, of half of T² (the convention of FlashAttention's figures).
fn sdpa([b, t, h, hk, d]: [usize; 5], gated: bool) -> Spec {
    let gate = if gated { "gated" } else { "no gate" };
    spec("gated_sdpa", format!("B{b} T{t} H{h}/{hk} D{d} {gate}"), move |m| {
        let (q, kv) = ([b, t, h, d], [b, t, hk, d]);
        let mut inputs = vec![m.x(&q, 0)?, m.x(&kv, 1)?, m.x(&kv, 2)?];
        if gated {
            inputs.push(m.x(&q, 3)?);
        }
        let product = 2.0 * (b * h * d) as f64 * (t * (t + 1) / 2) as f64;
        let (n, o) = (inputs.iter().map(Tensor::numel).sum::<usize>(), b * t * h * d);
        Ok(case(m, inputs, [2.0 * product, 5.0 * product], [n + o, 2 * n + 2 * o], |x| {
            gated_sdpa(&x[0], &x[1], &x[2], x.get(3).map(|g| (g, Gate::default())), None, Attention::default())
        }))
    })
}

/// Gated DeltaNet, counted as a recurrence: 6·Dk·Dv operations a token and value head forward, twice as many backward. Chunkwise kernels do about twice that.
fn delta(sizes: [usize; 5], packed: bool) -> Spec {
    delta_in(sizes, packed, None)
}

/// The same, with sequences cut into so many pieces.
fn delta_in([b, t, hk, hv, d]: [usize; 5], packed: bool, pieces: Option<usize>) -> Spec {
    let mut shape = if packed { format!("{b} packed of T{t} H{hk}/{hv} D{d}") } else { format!("B{b} T{t} H{hk}/{hv} D{d}") };
    if let Some(n) = pieces {
        shape += &format!(" pieces {n}");
    }
    spec("delta_rule", shape, move |m| {
        let [rows, time] = if packed { [1, b * t] } else { [b, t] };
        let (q, v) = ([rows, time, hk, d], [rows, time, hv, d]);
        let log_decay = m.randn(&[rows, time, hv], DType::F32, 3)?.sigmoid()?.affine(-0.1, 0.0)?;
        let beta = m.randn(&[rows, time, hv], DType::F32, 4)?.sigmoid()?;
        let bounds: Vec<i32> = (0..=b).map(|i| (i * t) as i32).collect();
        let mut inputs = vec![m.x(&q, 0)?, m.x(&q, 1)?, m.x(&v, 2)?, log_decay, beta];
        if packed {
            inputs.push(Tensor::from_slice(&bounds, &[b + 1], m.device)?);
        }
        let flops = 6.0 * (b * t * hv) as f64 * (d * d) as f64;
        let (n, o) = (b * t * d * (2 * hk + hv), b * t * hv * d);
        Ok(case(m, inputs, [flops, 2.0 * flops], [n + o, 2 * n + o], move |x| {
            let more = DeltaRuleInputs { log_decay: Some(&x[3]), beta: Some(&x[4]), initial_state: None, cu_seqlens: x.get(5) };
            let mut rule = DeltaRule::gated_delta_net();
            rule.pieces = pieces;
            Ok(delta_rule(rule, &x[0], &x[1], &x[2], more)?.0)
        }))
    })
}

fn conv([b, t, c, k]: [usize; 4]) -> Spec {
    spec("short_conv", format!("B{b} T{t} C{c} K{k}"), move |m| {
        let (inputs, n) = (vec![m.x(&[b, t, c], 0)?, m.x(&[c, k], 1)?], b * t * c);
        Ok(case(m, inputs, [0.0; 2], [2 * n, 3 * n], |x| Ok(short_conv(&x[0], &x[1], true, None, None)?.0)))
    })
}

fn norm([n, d]: [usize; 2]) -> Spec {
    spec("rms_norm", format!("N{n} D{d}"), move |m| {
        let inputs = vec![m.x(&[n, d], 0)?, m.x(&[d], 1)?];
        Ok(case(m, inputs, [0.0; 2], [2 * n * d, 3 * n * d], |x| rms_norm(&x[0], &x[1], 1e-6, true)))
    })
}

fn rotate([b, t, h, d]: [usize; 4]) -> Spec {
    spec("rope", format!("B{b} T{t} H{h} D{d}"), move |m| {
        let (inputs, n) = (vec![m.x(&[b, t, h, d], 0)?], b * t * h * d);
        Ok(case(m, inputs, [0.0; 2], [2 * n, 2 * n], move |x| rope(&x[0], d, 1e4, Positions::From(0))))
    })
}

fn glu([n, i]: [usize; 2]) -> Spec {
    spec("swiglu", format!("N{n} I{i}"), move |m| {
        let inputs = vec![m.x(&[n, 2 * i], 0)?];
        Ok(case(m, inputs, [0.0; 2], [3 * n * i, 5 * n * i], |x| swiglu(&x[0])))
    })
}

/// Three projections of each token by each of its experts; bytes are not counted, as they depend on where tokens go.
fn experts([n, h, e, k, i]: [usize; 5]) -> Spec {
    spec("moe", format!("N{n} H{h} E{e} top{k} I{i}"), move |m| {
        let small = |t: Tensor| t.affine(0.05, 0.0);
        let weights = [small(m.x(&[e, 2 * i, h], 2)?)?, small(m.x(&[e, h, i], 3)?)?];
        let inputs = [vec![m.x(&[n, h], 0)?, m.randn(&[n, e], DType::F32, 1)?], weights.to_vec()].concat();
        let flops = 6.0 * (n * k) as f64 * (h * i) as f64;
        let op = Moe { top_k: k, norm_topk: true };
        Ok(case(m, inputs, [flops, 2.0 * flops], [0; 2], move |x| Ok(moe(op, &x[0], &x[1], &x[2], &x[3])?.0)))
    })
}

/// One product forward, two backward.
fn head([n, h, v]: [usize; 3]) -> Spec {
    spec("linear_cross_entropy", format!("N{n} H{h} V{v}"), move |m| {
        let targets: Vec<i64> = (0..n).map(|i| ((i * 7919) % v) as i64).collect();
        let inputs = vec![m.x(&[n, h], 0)?, m.x(&[v, h], 1)?.affine(0.02, 0.0)?, Tensor::from_slice(&targets, &[n], m.device)?];
        let flops = 2.0 * (n * h) as f64 * v as f64;
        Ok(case(m, inputs, [flops, 2.0 * flops], [0; 2], |x| linear_cross_entropy(&x[0], &x[1], &x[2])))
    })
}

/// All in f32 whatever the precision: parameter and both moments are read and written, the gradient is read.
fn update([count, n]: [usize; 2]) -> Spec {
    spec("adamw", format!("{count} tensors of {n}"), move |m| {
        let f32s = |i: usize| m.randn(&[n], DType::F32, i as u64);
        let mut inputs = vec![];
        for i in 0..4 * count {
            // second moments are not negative
            let t = f32s(i)?;
            inputs.push(if i / count == 2 { t.mul(&t)? } else { t });
        }
        let op = AdamWMany { beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: vec![0.1; count], shadows: false };
        inputs.push(op.schedule(1e-6, 1000, m.device)?);
        inputs.push(Tensor::ones(&[], DType::F64, m.device)?);
        let run = move |x: &[Tensor]| {
            let of = |i: usize| x[i * count..(i + 1) * count].iter().collect::<Vec<&Tensor>>();
            adamw_many(op.clone(), &of(0), &of(1), &of(2), &[], &x[4 * count], &x[4 * count + 1], &of(3))?;
            Ok(x[0].clone())
        };
        Ok(Case { inputs, run: Box::new(run), forward: Cost { flops: 0.0, bytes: (28 * count * n) as f64 }, both: None })
    })
}

/// All cases, op by op as in [`NAMES`].
pub(super) fn all(scale: Scale) -> Vec<Spec> {
    match scale {
        Scale::Large => vec![
            sdpa([1, 16384, 16, 16, 128], false),
            sdpa([1, 16384, 16, 16, 128], true),
            sdpa([4, 4096, 8, 2, 128], true),
            delta([4, 8192, 16, 32, 128], false),
            delta([4, 8192, 16, 32, 128], true),
            delta([1, 8192, 2, 8, 128], false),
            // what the choice of pieces is worth
            delta_in([1, 8192, 2, 8, 128], false, Some(4)),
            delta_in([1, 8192, 2, 8, 128], false, Some(8)),
            delta_in([1, 8192, 2, 8, 128], false, Some(12)),
            delta_in([1, 8192, 2, 8, 128], false, Some(24)),
            delta_in([1, 8192, 2, 8, 128], false, Some(32)),
            conv([4, 8192, 8192, 4]),
            norm([32768, 2048]),
            rotate([4, 8192, 16, 128]),
            glu([32768, 5632]),
            experts([16384, 1024, 72, 6, 256]),
            experts([8192, 2048, 512, 10, 512]),
            head([16384, 1024, 32768]),
            head([8192, 2048, 151_936]),
            update([24, 14 << 20]),
        ],
        Scale::Small => vec![
            sdpa([1, 1024, 4, 4, 64], false),
            sdpa([1, 1024, 4, 4, 64], true),
            delta([1, 1024, 2, 4, 64], false),
            conv([2, 1024, 1024, 4]),
            norm([4096, 1024]),
            rotate([2, 1024, 8, 64]),
            glu([2048, 2048]),
            experts([1024, 256, 16, 2, 256]),
            head([512, 256, 8192]),
            update([8, 1 << 20]),
        ],
        Scale::Tiny => vec![
            sdpa([1, 40, 2, 1, 32], true),
            delta([2, 40, 1, 2, 32], false),
            conv([1, 20, 64, 4]),
            norm([8, 64]),
            rotate([1, 16, 2, 32]),
            glu([16, 32]),
            experts([16, 32, 4, 2, 16]),
            head([16, 32, 64]),
            update([2, 1000]),
        ],
    }
}
