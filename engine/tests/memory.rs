//! What is held, for how long, and that nothing grows. The counters are the process's, so these tests run one at a time.

use engine::cpu::memory;
use engine::{DType, Device, Meta, Op, Result, Saved, Tensor, cpu, no_grad, profile, run_on, run1};
use std::sync::{Mutex, MutexGuard};

fn alone() -> MutexGuard<'static, ()> {
    static ONE: Mutex<()> = Mutex::new(());
    ONE.lock().unwrap_or_else(|e| e.into_inner())
}
fn live() -> usize {
    memory().0
}
/// Bytes of this process in memory; 0 where the system does not tell.
fn resident() -> usize {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap_or_default();
    statm.split(' ').nth(1).and_then(|p| p.parse::<usize>().ok()).unwrap_or(0) * 4096
}
const MIB: usize = 1 << 20;

/// An output that its kernel never writes.
#[derive(Debug)]
struct Unwritten(usize);
impl Op for Unwritten {
    fn name(&self) -> &'static str {
        "unwritten"
    }
    fn arity(&self) -> std::ops::RangeInclusive<usize> {
        0..=0
    }
    fn infer(&self, _: &[Meta]) -> Result<Vec<Meta>> {
        Ok(vec![Meta::new(&[self.0], DType::F32)])
    }
}
engine::cpu_kernel!(Unwritten => |_, _, _| Ok(()));

#[test]
fn freed_blocks_are_taken_again_by_size_and_not_filled() {
    let _alone = alone();
    let n = 100_000;
    let unwritten = |n| run_on(Unwritten(n), &Device::cpu(), &[]).unwrap().remove(0);
    let sevens = Tensor::full(7.0, &[n], DType::F32, &Device::cpu()).unwrap();
    cpu::trim();
    let (before, cached, _) = memory();
    assert_eq!(cached, 0);
    drop(sevens);
    let (after, block, peak) = memory();
    assert!(before - after == block && (4 * n..5 * n).contains(&block), "the block waits in the cache: {block}");
    // another size leaves it there
    let other = unwritten(2 * n);
    assert_eq!(memory().1, block);
    drop(other);
    let rest = memory().1 - block;
    // one of its size gets it, as it is
    let again = unwritten(n);
    assert_eq!(memory(), (after + block, rest, peak.max(memory().2)));
    assert!(again.to_vec::<f32>().unwrap().iter().all(|x| *x == 7.0), "an output was filled before its kernel ran");
    drop(again);
    // and so does one that is a little smaller
    let smaller = unwritten(n - 100);
    assert_eq!(memory().1, rest);
    drop(smaller);
    cpu::trim();
    assert_eq!((memory().0, memory().1), (after, 0));
}

static HELD: Mutex<Vec<usize>> = Mutex::new(vec![]);
/// Identity, whose backward notes what is held.
#[derive(Debug)]
struct Probe;
impl Op for Probe {
    fn name(&self) -> &'static str {
        "probe"
    }
    fn infer(&self, x: &[Meta]) -> Result<Vec<Meta>> {
        Ok(x.to_vec())
    }
    fn backward(&self, _: &Saved, dy: &[Option<Tensor>], _: &[bool]) -> Result<Vec<Option<Tensor>>> {
        HELD.lock().unwrap().push(live());
        Ok(dy.to_vec())
    }
}
engine::cpu_kernel!(Probe => |_, x, y| {
    y.slice::<f32>(0)?.copy_from_slice(x.slice::<f32>(0)?);
    Ok(())
});

#[test]
fn saved_tensors_are_freed_as_the_sweep_passes() {
    let _alone = alone();
    let (layers, block) = (8, MIB);
    let x = Tensor::ones(&[block / 4], DType::F32, &Device::cpu()).unwrap().requires_grad();
    let before = live();
    let mut h = x.clone();
    for _ in 0..layers {
        // a square saves its input, which is the output of the probe below
        h = run1(Probe, &[&h]).unwrap().square().unwrap();
    }
    let loss = h.sum_all().unwrap();
    drop(h);
    let recorded = live() - before;
    assert!((layers * block..(layers + 1) * block).contains(&recorded), "one saved tensor a layer: {recorded}");
    HELD.lock().unwrap().clear();
    let grads = loss.backward().unwrap();
    let held = std::mem::take(&mut *HELD.lock().unwrap());
    assert_eq!(held.len(), layers);
    for (i, pair) in held.windows(2).enumerate() {
        assert!(pair[0] >= pair[1] + block, "layer {i}: {pair:?}");
    }
    // two gradients at a time on top of what was recorded
    assert!(held[0] <= before + recorded + 2 * block, "{held:?}");
    drop(grads);
    assert!(live() <= before + MIB / 16, "the graph's outputs are still here, what they saved is not");
    assert!(loss.backward().is_err());
}

#[test]
fn a_million_recorded_ops_without_backward_do_not_grow() {
    let _alone = alone();
    let x = Tensor::ones(&[256], DType::F32, &Device::cpu()).unwrap().requires_grad();
    // a step of a training loop that forgets its backward, and one that carries a state on
    let mut state = x.detach();
    let mut step = || {
        let y = x.square().unwrap().mul(&x).unwrap();
        assert!(y.is_tracked());
        state = state.mul(&x).unwrap().tanh().unwrap().detach();
    };
    (0..10_000).for_each(|_| step());
    let (held, before) = (live(), resident());
    (0..250_000).for_each(|_| step());
    assert_eq!(live(), held);
    assert!(resident() < before + 4 * MIB, "{before} -> {}", resident());
}

#[test]
fn a_chain_of_a_million_nodes_is_dropped_whole_and_without_recursion() {
    let _alone = alone();
    let before = live();
    let build_and_drop = |nodes: usize| {
        let mut x = Tensor::ones(&[1], DType::F32, &Device::cpu()).unwrap().requires_grad();
        for _ in 0..nodes {
            x = x.square().unwrap();
        }
        assert!(live() >= before + 64 * nodes, "every node holds what it saved");
        drop(x);
        assert_eq!(live(), before);
        cpu::trim();
        resident()
    };
    // a stack on which not even ten thousand nodes could be dropped recursively
    std::thread::scope(|s| {
        let run = || {
            let first = build_and_drop(1_000_000);
            let second = build_and_drop(200_000);
            assert!(second < first + 32 * MIB, "{first} -> {second}");
        };
        std::thread::Builder::new().stack_size(256 << 10).spawn_scoped(s, run).unwrap().join().unwrap();
    });
}

#[test]
fn views_copy_nothing() {
    let _alone = alone();
    let x = Tensor::zeros(&[MIB], DType::F32, &Device::cpu()).unwrap();
    let before = live();
    let v = x.reshape(&[1024, 1024]).unwrap().transpose(0, 1).unwrap().narrow(0, 3, 9).unwrap().expand(&[5, 9, 1024]).unwrap();
    let parts = v.split(1, &[4, 0, 5]).unwrap();
    assert_eq!((v.shape(), parts[2].shape(), live()), (&[5, 9, 1024][..], &[5, 5, 1024][..], before));
}

/// Σ_k a[m, k] b[k, n] of row-major numbers.
fn naive(a: &[f64], b: &[f64], (m, k, n): (usize, usize, usize)) -> Vec<f64> {
    (0..m * n).map(|i| (0..k).map(|p| a[i / n * k + p] * b[p * n + i % n]).sum()).collect()
}

#[test]
fn products_of_every_transpose_and_batch_copy_nothing() {
    let _alone = alone();
    let (m, k, n) = (45, 70, 38);
    // one number in memory order, `turned`: the last two axes swapped in memory
    let make = |lead: &[usize], rows: usize, cols: usize, turned: bool, dtype: DType| {
        let shape = if turned { [lead, &[cols, rows]].concat() } else { [lead, &[rows, cols]].concat() };
        let t = Tensor::randn(&shape, DType::F64, &Device::cpu(), 5, (rows * 100 + cols) as u64).unwrap().cast(dtype).unwrap();
        if turned { t.transpose(lead.len(), lead.len() + 1).unwrap() } else { t }
    };
    let leads: [(&[usize], &[usize]); 7] =
        [(&[], &[]), (&[3], &[3]), (&[2, 3], &[2, 3]), (&[2, 1], &[3]), (&[3], &[]), (&[], &[3]), (&[2, 1], &[1, 3])];
    for (dtype, bound) in [(DType::F64, 1e-14), (DType::F32, 1e-6), (DType::BF16, 4e-3), (DType::F16, 5e-4)] {
        for (la, lb) in leads {
            for turned in [(false, false), (false, true), (true, false), (true, true)] {
                let (a, b) = (make(la, m, k, turned.0, dtype), make(lb, k, n, turned.1, dtype));
                profile::start();
                let y = no_grad(|| a.matmul(&b)).unwrap();
                let seen = profile::stop();
                assert_eq!(seen.rows.iter().map(|r| (r.op, r.calls)).collect::<Vec<_>>(), [("matmul", 1)], "{la:?} {lb:?} {turned:?}");
                let lead = engine::broadcast_shape(la, lb).unwrap();
                assert_eq!((y.shape(), y.dtype()), (&[&lead[..], &[m, n]].concat()[..], dtype));
                let full = |t: &Tensor, r: usize, c: usize| t.expand(&[&lead[..], &[r, c]].concat()).unwrap().to_vec::<f64>().unwrap();
                let (a, b, y) = (full(&a, m, k), full(&b, k, n), y.to_vec::<f64>().unwrap());
                for i in 0..lead.iter().product() {
                    let want = naive(&a[i * m * k..][..m * k], &b[i * k * n..][..k * n], (m, k, n));
                    let off: f64 = want.iter().zip(&y[i * m * n..]).map(|(x, y)| (x - y).powi(2)).sum();
                    let size: f64 = want.iter().map(|x| x * x).sum();
                    assert!((off / size).sqrt() < bound, "{dtype} {la:?} {lb:?} {turned:?}: {:e}", (off / size).sqrt());
                }
            }
        }
    }
}
