//! Every primitive on a GPU, or on its emulator, gives what the CPU gives: all dtypes, views, ragged and empty shapes, special values.

use cuda::{Cuda, Graph};
use engine::prim::*;
use engine::{DType, Device, Result, Tensor, dispatch, run, run1};

const ALL: [DType; 8] = [DType::F64, DType::F32, DType::BF16, DType::F16, DType::I64, DType::I32, DType::U32, DType::U8];
const FLOATS: [DType; 4] = [DType::F64, DType::F32, DType::BF16, DType::F16];

/// The GPU where there is one, else the emulator.
fn device() -> Device {
    cuda::device(0).inspect_err(|e| eprintln!("nothing runs on a GPU: {e}")).or_else(|_| cuda::emulator()).unwrap()
}
/// An emulated device that no other test uses, unless there is no C++ compiler here: wrong indices and captures are a whole device's.
fn own(bytes: usize) -> Option<Device> {
    cuda::emulator_with_memory(bytes).map_err(|e| eprintln!("SKIPPED: nothing is emulated: {e}")).ok()
}
fn randn(shape: &[usize], d: DType, stream: u64) -> Tensor {
    let t = Tensor::randn(shape, DType::F64, &Device::cpu(), 5, stream).unwrap();
    // integers get numbers from about -30 to 30, unsigned ones from 0 on
    let scaled = match d {
        DType::I64 | DType::I32 => t.affine(10.0, 0.0),
        DType::U32 | DType::U8 => t.abs().unwrap().affine(10.0, 0.0),
        _ => Ok(t),
    };
    scaled.unwrap().cast(d).unwrap()
}
fn bits(t: &Tensor) -> Vec<u64> {
    // NaN of any payload is one NaN
    match t.dtype() {
        DType::I64 => t.to_vec::<i64>().unwrap().into_iter().map(|x| x as u64).collect(),
        _ => t.to_vec::<f64>().unwrap().into_iter().map(|x| if x.is_nan() { f64::NAN.to_bits() } else { x.to_bits() }).collect(),
    }
}
fn unit(d: DType) -> f64 {
    match d {
        DType::F64 => 1e-14,
        DType::F32 => 1e-6,
        DType::BF16 => 8e-3,
        DType::F16 => 1e-3,
        _ => 0.0,
    }
}
#[track_caller]
fn same(found: &Tensor, want: &Tensor, what: &str) {
    assert_eq!(found.meta(), want.meta(), "{what}");
    assert_eq!(bits(found), bits(want), "{what}: {found:?} {want:?}");
}
#[track_caller]
fn close(found: &Tensor, want: &Tensor, tolerance: f64, what: &str) {
    assert_eq!(found.meta(), want.meta(), "{what}");
    let (f, w): (Vec<f64>, Vec<f64>) = (found.to_vec().unwrap(), want.to_vec().unwrap());
    for (i, (f, w)) in f.iter().zip(&w).enumerate() {
        let ok = (f.is_nan() && w.is_nan()) || f == w || (f - w).abs() <= tolerance * w.abs().max(1.0);
        assert!(ok, "{what} at {i}: {f} {w}");
    }
}
/// The function on the CPU and on the device.
fn both(f: impl Fn(&[Tensor]) -> Result<Tensor>, x: &[&Tensor]) -> (Tensor, Tensor) {
    let cpu: Vec<Tensor> = x.iter().map(|t| (*t).clone()).collect();
    let gpu: Vec<Tensor> = x.iter().map(|t| t.to_device(&device()).unwrap()).collect();
    (f(&gpu).unwrap(), f(&cpu).unwrap())
}

const UNARY: [UnaryKind; 18] = {
    use UnaryKind::*;
    [Neg, Exp, Ln, Sqrt, Rsqrt, Recip, Square, Abs, Relu, Sigmoid, Silu, Softplus, Tanh, Sin, Cos, Affine(1.5, -0.25), Pow(2.5), Pow(-1.0)]
};

#[test]
fn functions_and_their_slopes() {
    let special = [0.0, -0.0, 1.0, -1.0, 1e-30, -1e-3, 88.0, -100.0, f64::INFINITY, f64::NEG_INFINITY, f64::NAN, 3e4, -3e4, 0.5];
    for d in FLOATS {
        let x =
            Tensor::cat(&[&randn(&[301], d, 1).reshape(&[301]).unwrap(), &Tensor::from_vec(special, &[14]).unwrap().cast(d).unwrap()], 0).unwrap();
        let dy = randn(&[315], d, 2);
        for kind in UNARY {
            let (f, w) = both(|x| run1(Unary { kind }, &[&x[0]]), &[&x]);
            close(&f, &w, 4.0 * unit(d), &format!("{kind:?} {d}"));
            // powers of negative numbers aside, slopes at infinity and zero are compared too
            let (f, w) = both(|x| run1(UnaryBackward { kind }, &[&x[0], &x[1]]), &[&x, &dy]);
            close(&f, &w, 8.0 * unit(d), &format!("slope of {kind:?} {d}"));
        }
    }
}

#[test]
fn sine_holds_for_large_arguments() {
    let x: Vec<f64> = (0..200).map(|i| (i as f64 - 100.0) * 1.7f64.powi(i % 40)).collect();
    for d in [DType::F64, DType::F32] {
        let x = Tensor::from_vec(x.clone(), &[200]).unwrap().cast(d).unwrap();
        for kind in [UnaryKind::Sin, UnaryKind::Cos] {
            let (f, w) = both(|x| run1(Unary { kind }, &[&x[0]]), &[&x]);
            close(&f, &w, if d == DType::F64 { 3e-16 } else { 6e-8 }, &format!("{kind:?} {d}"));
        }
    }
}

/// Views of a tensor: itself, transposed, narrowed, broadcast, a scalar.
fn views(d: DType, stream: u64) -> Vec<(&'static str, Tensor)> {
    let t = |shape: &[usize]| randn(shape, d, stream);
    vec![
        ("dense", t(&[4, 6, 40])),
        ("odd", t(&[4, 6, 41]).narrow(2, 1, 40).unwrap()),
        ("transposed", t(&[40, 6, 4]).permute(&[2, 1, 0]).unwrap()),
        ("row", t(&[40]).expand(&[4, 6, 40]).unwrap()),
        ("column", t(&[4, 1, 1]).expand(&[4, 6, 40]).unwrap()),
        ("scalar", t(&[1, 1, 1]).expand(&[4, 6, 40]).unwrap()),
    ]
}
/// On the emulator, as the very same view.
fn on(name: &str, d: DType, stream: u64) -> Tensor {
    let e = device();
    let t = |shape: &[usize]| randn(shape, d, stream).to_device(&e).unwrap();
    match name {
        "dense" => t(&[4, 6, 40]),
        "odd" => t(&[4, 6, 41]).narrow(2, 1, 40).unwrap(),
        "transposed" => t(&[40, 6, 4]).permute(&[2, 1, 0]).unwrap(),
        "row" => t(&[40]).expand(&[4, 6, 40]).unwrap(),
        "column" => t(&[4, 1, 1]).expand(&[4, 6, 40]).unwrap(),
        _ => t(&[1, 1, 1]).expand(&[4, 6, 40]).unwrap(),
    }
}

#[test]
fn arithmetic_of_every_view_and_dtype() {
    use BinaryKind::*;
    for d in ALL {
        for (na, a) in views(d, 1) {
            for (nb, b) in views(d, 2) {
                // one kind for each pair of views, all kinds over the pairs; integers have no division
                for kind in [Add, Sub, Mul, Div, Max, Min].into_iter().filter(|k| d.is_float() || *k != Div) {
                    if na != "dense" && nb != "dense" && kind != Sub {
                        continue;
                    }
                    let want = run1(Binary { kind }, &[&a, &b]).unwrap();
                    let found = run1(Binary { kind }, &[&on(na, d, 1), &on(nb, d, 2)]).unwrap();
                    same(&found, &want, &format!("{kind:?} {d} {na} {nb}"));
                }
            }
        }
    }
}

#[test]
fn comparison_and_selection() {
    let nan = |t: Tensor| if t.dtype().is_float() { t.affine(1.0, 0.0).unwrap() } else { t };
    for d in ALL {
        for (na, a) in views(d, 1) {
            let b = randn(&[4, 6, 40], d, 2);
            let c = a.lt(&b).unwrap();
            for kind in [CompareKind::Eq, CompareKind::Lt, CompareKind::Le] {
                let found = run1(Compare { kind }, &[&on(na, d, 1), &on("dense", d, 2)]).unwrap();
                same(&found, &run1(Compare { kind }, &[&nan(a.clone()), &b]).unwrap(), &format!("{kind:?} {d} {na}"));
            }
            let found = c.to_device(&device()).unwrap().select(&on(na, d, 1), &on("dense", d, 2)).unwrap();
            same(&found, &c.select(&a, &b).unwrap(), &format!("where {d} {na}"));
        }
    }
    let odd = Tensor::from_vec([f64::NAN, 1.0, f64::INFINITY, -0.0], &[4]).unwrap();
    for kind in [CompareKind::Eq, CompareKind::Lt, CompareKind::Le] {
        let (f, w) = both(|x| run1(Compare { kind }, &[&x[0].unsqueeze(1)?.expand(&[4, 4])?, &x[0].unsqueeze(0)?.expand(&[4, 4])?]), &[&odd]);
        same(&f, &w, "NaN compares false");
    }
}

#[test]
fn casts_between_all_dtypes() {
    let special = [
        0.0,
        -0.0,
        0.5,
        -0.5,
        1.5,
        -1.5,
        254.6,
        255.0,
        256.0,
        300.0,
        -1.0,
        -300.0,
        65504.0,
        65519.0,
        65520.0,
        1e5,
        -1e5,
        3e9,
        5e9,
        -3e9,
        1e20,
        -1e20,
        1e300,
        -1e300,
        1e-8,
        6e-8,
        1e-40,
        1e-310,
        f64::INFINITY,
        f64::NEG_INFINITY,
        f64::NAN,
        2147483647.0,
        2147483648.0,
        4294967295.0,
        9.3e18,
        1.00390625,
        1.01171875,
    ];
    for from in ALL {
        let x = Tensor::cat(&[&Tensor::from_vec(special, &[special.len()]).unwrap().cast(from).unwrap(), &randn(&[500], from, 1)], 0).unwrap();
        for to in ALL {
            let (f, w) = both(|x| if from == to { Ok(x[0].clone()) } else { run1(Cast { to }, &[&x[0]]) }, &[&x]);
            same(&f, &w, &format!("{from} to {to}"));
        }
    }
}

/// A bf16 is rounded once, also from an f64 between a tie and its neighbour.
#[test]
fn bf16_of_f64_is_the_nearest() {
    let tie = 1.0 + 1.0 / 256.0;
    let x = Tensor::from_vec([tie, tie + 1e-15, tie - 1e-15, 1.0 + 3.0 / 256.0, 1.0 + 3.0 / 256.0 - 1e-15, -tie - 1e-15], &[6]).unwrap();
    let y: Vec<f64> = x.to_device(&device()).unwrap().cast(DType::BF16).unwrap().to_vec().unwrap();
    let up = 1.0 + 1.0 / 128.0;
    assert_eq!(y, [1.0, up, 1.0, 1.0 + 2.0 / 128.0, up, -up]);
}

#[test]
fn copies_padding_and_concatenation() {
    for d in ALL {
        for (name, t) in views(d, 3) {
            same(&run1(Contiguous, &[&on(name, d, 3)]).unwrap(), &run1(Contiguous, &[&t]).unwrap(), &format!("{d} {name}"));
        }
        let (a, b, c) = (randn(&[3, 5, 8], d, 1), randn(&[3, 2, 8], d, 2), randn(&[3, 0, 8], d, 3));
        let (f, w) = both(|x| Tensor::cat(&[&x[0], &x[2], &x[1], &x[0]], 1), &[&a, &b, &c]);
        same(&f, &w, "cat");
        for axis in 0..3 {
            let (f, w) = both(|x| x[0].pad(axis, 2, 1), &[&a]);
            same(&f, &w, "pad");
            let (f, w) = both(|x| x[0].pad(axis, 0, 3), &[&a]);
            same(&f, &w, "pad after");
        }
        let (f, w) = both(
            |x| {
                let y = x[0].contiguous()?.affine_or_self()?;
                y.narrow(0, 1, 2)?.assign(&x[1].narrow(0, 0, 2)?)?;
                engine::run_in_place(AddAssign { meta: y.meta() }, &[&y], &[&x[0]])?;
                Ok(y)
            },
            &[&a, &randn(&[3, 5, 8], d, 4)],
        );
        same(&f, &w, "assign and add");
    }
    // seven axes that can't be merged
    let shape = [2, 3, 2, 3, 2, 3, 2];
    let (f, w) = both(|x| x[0].permute(&[6, 5, 4, 3, 2, 1, 0])?.contiguous(), &[&randn(&shape, DType::F32, 1)]);
    same(&f, &w, "seven axes");
}
/// Against element by element on the host: sides at, above and below whole tiles, axes in between and outside, gaps, a repeated axis.
#[test]
fn transposing_copies_of_every_element_size() {
    let shapes: [(&[usize], &[usize]); 12] = [
        (&[32, 32], &[1, 0]),
        (&[2, 66, 130], &[0, 2, 1]),
        (&[40, 3, 70], &[2, 1, 0]),
        (&[16, 100], &[1, 0]),
        (&[33, 31], &[1, 0]),
        (&[15, 40], &[1, 0]),
        (&[65, 97], &[1, 0]),
        (&[3, 40, 17], &[0, 2, 1]),
        (&[37, 3, 50], &[2, 1, 0]),
        (&[2, 34, 3, 2, 21], &[0, 4, 2, 3, 1]),
        (&[2, 19, 2, 3, 2, 35], &[5, 3, 2, 4, 0, 1]),
        (&[0, 40, 40], &[0, 2, 1]),
    ];
    for d in [DType::U8, DType::BF16, DType::F16, DType::F32, DType::I64] {
        for (shape, axes) in shapes {
            let x = randn(shape, d, 1).permute(axes).unwrap();
            let (f, w) = both(|x| x[0].permute(axes)?.contiguous(), &[&randn(shape, d, 1)]);
            same(&f, &w, &format!("{d} {shape:?} {axes:?}"));
            assert_eq!(x.shape(), f.shape());
        }
        // every other matrix, from an odd place; a column repeated along an axis between
        let x = randn(&[41, 70], d, 2);
        let inner = |x: &Tensor| x.narrow(0, 3, 37)?.narrow(1, 5, 61)?.transpose(0, 1)?.contiguous();
        let (f, w) = both(|x| inner(&x[0]), &[&x]);
        same(&f, &w, "a part");
        let spread = |x: &Tensor| x.unsqueeze(1)?.expand(&[41, 3, 70])?.permute(&[2, 1, 0])?.contiguous();
        let (f, w) = both(|x| spread(&x[0]), &[&x]);
        same(&f, &w, "repeated");
        let flat: Vec<f64> = x.to_vec().unwrap();
        let turned: Vec<f64> = x.to_device(&device()).unwrap().transpose(0, 1).unwrap().contiguous().unwrap().to_vec().unwrap();
        assert!((0..70).all(|c| (0..41).all(|r| turned[c * 41 + r] == flat[r * 70 + c])), "{d}");
    }
}
trait Fresh: Sized {
    fn affine_or_self(&self) -> Result<Self>;
}
impl Fresh for Tensor {
    /// A copy that nobody else holds.
    fn affine_or_self(&self) -> Result<Tensor> {
        Tensor::cat(&[self], 0)
    }
}

#[test]
fn reductions_and_running_sums() {
    for d in FLOATS {
        // short rows by warps, long ones by blocks, very long ones in parts; few and many columns
        for shape in [[37, 65], [3, 1025], [1, 40_000], [200, 1100], [700, 5], [1, 1], [5, 0], [0, 5]] {
            let x = randn(&shape, d, 1);
            let t = unit(d) * if d == DType::F64 { 100.0 } else { 30.0 };
            for leading in [false, true] {
                let (f, w) = both(|x| run1(Sum { leading }, &[&x[0]]), &[&x]);
                close(&f, &w, t, &format!("sum {leading} {shape:?} {d}"));
            }
            if shape[1] > 0 {
                let (f, w) = both(|x| run1(MaxReduce, &[&x[0]]), &[&x]);
                same(&f, &w, &format!("max {shape:?} {d}"));
            }
            for reverse in [false, true] {
                // the CPU goes element by element, whose error grows faster: f64 tells
                let f = run1(CumSum { reverse }, &[&x.to_device(&device()).unwrap()]).unwrap();
                let w = run1(CumSum { reverse }, &[&x.cast(DType::F64).unwrap()]).unwrap().cast(d).unwrap();
                let (f, w): (Vec<f64>, Vec<f64>) = (f.to_vec().unwrap(), w.to_vec().unwrap());
                let largest = w.iter().fold(1.0, |m: f64, x| m.max(x.abs()));
                let sums = if d == DType::F64 { 1e-14 } else { 1e-6 };
                for (i, (f, w)) in f.iter().zip(&w).enumerate() {
                    assert!((f - w).abs() <= unit(d) * w.abs() + sums * largest, "cumsum {reverse} {shape:?} {d} at {i}: {f} {w}");
                }
            }
        }
    }
}

#[test]
fn softmax_and_its_gradient() {
    let inf = f64::NEG_INFINITY;
    for d in FLOATS {
        for shape in [[37, 65], [3, 1500], [2, 1], [0, 4], [4, 0]] {
            let (x, dy) = (randn(&shape, d, 1), randn(&shape, d, 2));
            for log in [false, true] {
                let (f, w) = both(|x| run1(Softmax { log }, &[&x[0]]), &[&x]);
                close(&f, &w, 4.0 * unit(d), &format!("{log} {shape:?} {d}"));
                let (f, w) = both(|x| run1(SoftmaxBackward { log }, &[&x[0], &x[1]]), &[&w, &dy]);
                close(&f, &w, 30.0 * unit(d), &format!("gradient {log} {shape:?} {d}"));
            }
        }
        let x = Tensor::from_vec([inf, 1.0, 2.0, inf, inf, inf, 700.0, 1.0, -700.0, 0.0, f64::NAN, 1.0], &[4, 3]).unwrap().cast(d).unwrap();
        for log in [false, true] {
            let (f, w) = both(|x| run1(Softmax { log }, &[&x[0]]), &[&x]);
            close(&f, &w, 4.0 * unit(d), &format!("masked {log} {d}"));
        }
    }
}

fn indices(n: usize, below: usize, d: DType) -> Tensor {
    let v: Vec<i64> = (0..n).map(|i| (i * i * 7 + i * 3) as i64 % below as i64).collect();
    Tensor::from_vec(v, &[n]).unwrap().cast(d).unwrap()
}

#[test]
fn selection_and_sums_by_index() {
    for (k, d) in ALL.into_iter().enumerate() {
        let kind = [DType::I64, DType::I32, DType::U32][k % 3];
        for (axis, shape) in [(0, [50, 3, 16]), (1, [2, 70, 5]), (2, [3, 4, 40])] {
            let x = randn(&shape, d, 1);
            let idx = indices(90, shape[axis], kind);
            let (f, w) = both(|x| x[0].index_select(axis, &x[1]), &[&x, &idx]);
            same(&f, &w, "index_select");
            let mut many = shape;
            many[axis] = 300;
            let (y, idx) = (randn(&many, d, 2), indices(300, shape[axis], kind));
            let (f, w) = both(|x| x[0].index_add(axis, &x[1], shape[axis]), &[&y, &idx]);
            // sums of halves are rounded once here and after each term on the CPU
            if matches!(d, DType::BF16 | DType::F16) {
                let wide = y.cast(DType::F32).unwrap().index_add(axis, &idx, shape[axis]).unwrap().cast(d).unwrap();
                close(&f, &wide, unit(d), "index_add");
                close(&w, &wide, 10.0 * unit(d), "index_add on the CPU");
            } else {
                same(&f, &w, "index_add");
            }
            let mut few = shape;
            few[axis] = 7;
            for (shape_of_index, len) in [(few, shape[axis]), (many, 9)] {
                let idx = indices(shape_of_index.iter().product(), len.min(shape[axis]), kind).reshape(&shape_of_index).unwrap();
                let (f, w) = both(|x| x[0].gather(axis, &x[1]), &[&x, &idx]);
                same(&f, &w, "gather");
                let y = randn(&shape_of_index, d, 3);
                let (f, w) = both(|x| x[0].scatter_add(axis, &x[1], len), &[&y, &idx]);
                same(&f, &w, "scatter_add");
            }
        }
    }
    // more terms than a list holds, all for one entry
    let (x, idx) = (randn(&[5000, 3], DType::F32, 1), Tensor::from_vec(vec![4i64; 5000], &[5000]).unwrap());
    let (f, w) = both(|x| x[0].index_add(0, &x[1], 40), &[&x, &idx]);
    close(&f, &w, 1e-4, "one entry");
}

#[test]
fn a_wrong_index_is_an_error_at_the_next_download() {
    let Some(d) = own(1 << 24) else { return };
    let x = Tensor::from_slice(&[1f32, 2.0, 3.0], &[3], &d).unwrap();
    for bad in [3i64, -1] {
        let idx = Tensor::from_slice(&[0, bad], &[2], &d).unwrap();
        let m = x.index_select(0, &idx).unwrap().to_vec::<f32>().unwrap_err().to_string();
        assert!(m.contains("index_select") && m.contains(&bad.to_string()), "{m}");
        // told once
        assert_eq!(x.to_vec::<f32>().unwrap(), [1.0, 2.0, 3.0]);
        let two = x.narrow(0, 0, 2).unwrap();
        let ops: [&dyn Fn() -> Result<Tensor>; 3] = [&|| x.gather(0, &idx), &|| two.scatter_add(0, &idx, 3), &|| two.index_add(0, &idx, 3)];
        for f in ops {
            assert!(f().unwrap().to_vec::<f32>().unwrap_err().to_string().contains("outside"));
        }
    }
}

#[test]
fn sorting_arg_max_and_the_largest() {
    let nan = f64::NAN;
    let odd = [1.0, nan, -0.0, 0.0, f64::INFINITY, nan, -1.0, f64::NEG_INFINITY, 1.0, 0.0];
    for d in ALL {
        let mut inputs = vec![randn(&[5, 37], d, 1), randn(&[1, 3000], d, 2), randn(&[3, 1], d, 3), randn(&[2, 1024], d, 4), randn(&[9, 300], d, 5)];
        inputs.push(Tensor::from_vec(odd, &[2, 5]).unwrap().cast(d).unwrap());
        for x in inputs {
            let (rows, cols) = (x.dim(0), x.dim(1));
            let (f, w) = both(|x| run1(ArgMax, &[&x[0]]), &[&x]);
            same(&f, &w, "argmax");
            let g = x.to_device(&device()).unwrap();
            for k in [0, 1, 3, 32, 70, cols] {
                if k <= cols {
                    let (f, w) = (run(TopK { k }, &[&g]).unwrap(), run(TopK { k }, &[&x]).unwrap());
                    same(&f[1], &w[1], &format!("top {k} of [{rows}, {cols}] {d}, places"));
                    same(&f[0], &w[0], &format!("top {k} of [{rows}, {cols}] {d}"));
                }
            }
            for descending in [false, true] {
                let (f, w) = (run(Sort { descending }, &[&g]).unwrap(), run(Sort { descending }, &[&x]).unwrap());
                same(&f[1], &w[1], &format!("sort {descending} [{rows}, {cols}] {d}, places"));
                same(&f[0], &w[0], &format!("sort {descending} [{rows}, {cols}] {d}"));
            }
        }
    }
}

#[test]
fn products_of_every_view() {
    for d in FLOATS {
        let t = |shape: &[usize], stream| randn(shape, d, stream);
        let turn = |x: &Tensor| x.transpose(x.rank() - 2, x.rank() - 1).unwrap();
        type Make = fn(&Tensor) -> Result<Tensor>;
        let shapes: Vec<(Tensor, Tensor, Make, Make)> = vec![
            (t(&[7, 9], 1), t(&[9, 5], 2), |x| Ok(x.clone()), |x| Ok(x.clone())),
            (turn(&t(&[7, 9], 1)).contiguous().unwrap(), t(&[5, 9], 2), |x| x.transpose(0, 1), |x| x.transpose(0, 1)),
            // rows apart, and a column stride that no library reads
            (t(&[7, 20], 1), t(&[18, 5], 2), |x| x.narrow(1, 3, 9), |x| x.reshape(&[9, 2, 5])?.narrow(1, 1, 1)?.reshape(&[9, 5])),
            (t(&[7, 9, 2], 1), t(&[9, 5], 2), |x| x.narrow(2, 1, 1)?.reshape(&[7, 9]), |x| Ok(x.clone())),
            // batches: merged, broadcast, transposed among each other
            (t(&[2, 3, 7, 9], 1), t(&[2, 3, 9, 5], 2), |x| Ok(x.clone()), |x| Ok(x.clone())),
            (t(&[2, 3, 7, 9], 1), t(&[3, 9, 5], 2), |x| Ok(x.clone()), |x| x.unsqueeze(0)?.expand(&[2, 3, 9, 5])),
            (t(&[2, 7, 3, 9], 1), t(&[2, 5, 3, 9], 2), |x| x.permute(&[0, 2, 1, 3]), |x| x.permute(&[0, 2, 3, 1])),
            // vectors and nothing at all
            (t(&[1, 9], 1), t(&[9, 1], 2), |x| Ok(x.clone()), |x| Ok(x.clone())),
            (t(&[3, 0], 1), t(&[0, 4], 2), |x| Ok(x.clone()), |x| Ok(x.clone())),
            (t(&[0, 3], 1), t(&[3, 4], 2), |x| Ok(x.clone()), |x| Ok(x.clone())),
        ];
        for (i, (a, b, fa, fb)) in shapes.iter().enumerate() {
            let (f, w) = both(|x| run1(MatMul::default(), &[&fa(&x[0])?, &fb(&x[1])?]), &[a, b]);
            close(&f, &w, 4.0 * unit(d), &format!("product {i} {d}"));
        }
    }
}

/// Of a weight that is used twice, so that the second gradient is added to the first in its dtype.
#[test]
fn gradients_of_products_in_every_dtype() {
    for d in FLOATS {
        let (x, w) = (randn(&[2, 6, 8], d, 1), randn(&[8, 8], d, 2));
        let grads = |x: &[Tensor]| -> Result<[Tensor; 2]> {
            let (x, w) = (x[0].requires_grad(), x[1].affine(0.25, 0.0)?.requires_grad());
            let h = x.matmul(&w)?.silu()?;
            let g = h.matmul(&w.transpose(0, 1)?)?.square()?.mean(&[0, 1, 2], false)?.backward()?;
            Ok([g.get(&x).expect("a gradient").clone(), g.get(&w).expect("a gradient").clone()])
        };
        let want = grads(&[x.cast(DType::F64).unwrap(), w.cast(DType::F64).unwrap()]).unwrap();
        let found = grads(&[x.to_device(&device()).unwrap(), w.to_device(&device()).unwrap()]).unwrap();
        for (f, w) in found.iter().zip(&want) {
            close(f, &w.cast(d).unwrap(), 4.0 * unit(d), &format!("gradient of a product in {d}"));
        }
    }
}

#[test]
fn results_do_not_depend_on_what_memory_held() {
    let Some(d) = own(1 << 26) else { return };
    let step = || -> Result<Vec<u64>> {
        let x = Tensor::randn(&[33, 129], DType::F32, &d, 1, 1)?.requires_grad();
        let w = Tensor::randn(&[129, 64], DType::F32, &d, 1, 2)?.requires_grad();
        let y = x.matmul(&w)?.silu()?.softmax(1)?.log_softmax(0)?.mean(&[0, 1], false)?;
        let g = y.backward()?;
        Ok([bits(g.get(&x).unwrap()), bits(g.get(&w).unwrap()), bits(&y.detach())].concat())
    };
    let first = step().unwrap();
    // used blocks come back in another order
    let _hold = Tensor::zeros(&[33, 129], DType::F32, &d).unwrap();
    assert_eq!(first, step().unwrap());
}

/// A small training step, gradient and update, eager and captured.
#[test]
fn a_captured_step_trains_as_an_eager_one() {
    let train = |steps: usize, captured: bool| -> Result<Vec<u64>> {
        let Some(d) = own(1 << 26) else { return Ok(vec![steps as u64]) };
        let x = Tensor::randn(&[16, 12], DType::F32, &d, 1, 1)?;
        let w = Tensor::randn(&[12, 8], DType::F32, &d, 1, 2)?;
        let mut step = || -> Result<Tensor> {
            let leaf = w.requires_grad();
            let loss = x.matmul(&leaf)?.tanh()?.square()?.mean(&[0, 1], false)?;
            let g = loss.backward()?;
            let update = engine::no_grad(|| w.detach().sub(&g.get(&leaf).expect("a gradient").affine(0.5, 0.0)?))?;
            w.assign(&update)?;
            Ok(loss.detach())
        };
        if captured {
            let g = Graph::capture(&d, 2, &mut step)?;
            for _ in 2..steps {
                g.replay()?;
            }
            assert!(g.nodes() > 5 && Cuda::of(&d)?.is_emulator());
            return Ok([bits(&g.output), bits(&w)].concat());
        }
        let mut loss = None;
        for _ in 0..steps {
            loss = Some(step()?);
        }
        Ok([bits(&loss.expect("a step")), bits(&w)].concat())
    };
    assert_eq!(train(6, false).unwrap(), train(6, true).unwrap());
    assert_ne!(train(6, false).unwrap(), train(5, false).unwrap());
}

#[test]
fn elements_survive_the_way_to_the_device_and_back() {
    for d in ALL {
        dispatch!(d, |T| {
            let x = randn(&[3, 7], d, 1);
            let y = x.to_device(&device()).unwrap();
            assert_eq!(y.to_vec::<T>().unwrap(), x.to_vec::<T>().unwrap());
        });
        same(&Tensor::full(3.0, &[5], d, &device()).unwrap(), &Tensor::full(3.0, &[5], d, &Device::cpu()).unwrap(), "full");
    }
}

#[test]
fn a_step_that_panics_while_it_is_captured_leaves_the_device_as_it_was() {
    let Some(d) = own(1 << 24) else { return };
    let x = Tensor::ones(&[1000], DType::F32, &d).unwrap();
    let live = Cuda::of(&d).unwrap().stats().live;
    let mut calls = 0;
    let capture = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        Graph::capture(&d, 1, || {
            let y = x.add(&x)?;
            calls += 1;
            assert!(calls < 2, "as a user's step may");
            Ok(y)
        })
    }));
    assert!(capture.is_err());
    assert_eq!(Cuda::of(&d).unwrap().stats().live, live);
    assert_eq!(x.add(&x).unwrap().to_vec::<f32>().unwrap(), [2.0; 1000]);
    let again = Graph::capture(&d, 1, || x.add(&x)).unwrap();
    again.replay().unwrap();
    assert_eq!(again.output.to_vec::<f32>().unwrap(), [2.0; 1000]);
}
