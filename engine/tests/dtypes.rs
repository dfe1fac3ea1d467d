//! Every primitive in every dtype that it is defined for, on dense, strided, empty and enormous tensors.

use engine::{DType, Device, Error, Result, SelfTest, Tensor, self_tests};

const ALL: [DType; 8] = [DType::F64, DType::F32, DType::BF16, DType::F16, DType::I64, DType::I32, DType::U32, DType::U8];
/// Floats, with a bound on RMS(error) / RMS(value): a few roundings.
const FLOATS: [(DType, f64); 4] = [(DType::F64, 1e-13), (DType::F32, 1e-6), (DType::BF16, 8e-3), (DType::F16, 1e-3)];

/// What the self-tests of `doctor` leave out.
const MORE: [SelfTest; 4] = [
    SelfTest {
        name: "comparisons",
        shapes: &[&[37, 131], &[131]],
        op: |x| {
            let (a, b) = (&x[0], &x[1]);
            [a.eq(b), a.lt(b), a.le(b), a.gt(b), a.ge(b), a.eq(a), a.le(a)].into_iter().map(|y| y?.cast(a.dtype())).collect()
        },
        reference: None,
    },
    SelfTest {
        name: "places",
        shapes: &[&[37, 131]],
        op: |x| [x[0].argmax(0)?, x[0].argmax(1)?, x[0].topk(7)?.1, x[0].sort(false)?.1].iter().map(|y| y.cast(x[0].dtype())).collect(),
        reference: None,
    },
    SelfTest {
        name: "more of indexing",
        shapes: &[&[37, 131]],
        op: |x| {
            let rows = Tensor::from_vec((0..37).map(|i| i * 5 % 9).collect::<Vec<u32>>(), &[37])?;
            Ok(vec![x[0].index_add(0, &rows, 9)?, x[0].split(1, &[100, 0, 31])?[2].square()?, x[0].sort(false)?.0, x[0].max(&[0], true)?])
        },
        reference: None,
    },
    SelfTest {
        name: "views",
        shapes: &[&[37, 130]],
        op: |x| {
            let t = x[0].transpose(0, 1)?;
            let wide = x[0].narrow(0, 4, 1)?.expand(&[3, 37, 130])?;
            Ok(vec![t.mul(&t)?, wide.mul(&x[0])?, t.narrow(0, 5, 70)?.silu()?, x[0].reshape(&[37, 13, 10])?.permute(&[1, 2, 0])?.sum(&[1], false)?])
        },
        reference: None,
    },
];

#[test]
fn floats_and_their_gradients_agree_with_f64() {
    let tests = self_tests();
    assert!(tests.len() >= 9, "{}", tests.len());
    for t in tests.into_iter().chain(&MORE) {
        for (dtype, bound) in FLOATS {
            let e = t.run(&Device::cpu(), dtype).unwrap_or_else(|e| panic!("{} in {dtype}: {e}", t.name));
            assert!(e <= bound, "{} in {dtype}: {e:e}", t.name);
        }
    }
}

/// Numbers that every dtype holds exactly, and whose sums and products are integers up to 225.
fn small(shape: &[usize], dtype: DType, salt: usize) -> Tensor {
    let n: usize = shape.iter().product();
    Tensor::from_vec((0..n).map(|i| ((i * 7919 + salt * 31) % 15) as u8).collect::<Vec<_>>(), shape).unwrap().cast(dtype).unwrap()
}

#[test]
fn arithmetic_comparison_and_choice_in_every_dtype_and_layout() {
    // rows longer than a piece of halves and than a task, and layouts with steps of 1, 0 and more on either side
    for shape in [[5, 3301], [1, 16_500], [9, 13]] {
        for dtype in ALL {
            let turned = |salt| small(&[shape[1], shape[0]], dtype, salt).transpose(0, 1).unwrap();
            let views = [small(&shape, dtype, 1), turned(2), small(&[shape[1]], dtype, 3), small(&[shape[0], 1], dtype, 4), small(&[], dtype, 5)];
            let views: Vec<Tensor> = views.iter().map(|v| v.expand(&shape).unwrap()).collect();
            for a in &views {
                for b in &views {
                    let (va, vb) = (a.to_vec::<f64>().unwrap(), b.to_vec::<f64>().unwrap());
                    let check = |name: &str, y: Result<Tensor>, f: &dyn Fn(f64, f64) -> f64, to: DType| {
                        let y = y.unwrap();
                        assert_eq!((y.shape(), y.dtype()), (&shape[..], to), "{name}");
                        let want = va.iter().zip(&vb).map(|(a, b)| f(*a, *b));
                        assert!(y.to_vec::<f64>().unwrap().into_iter().eq(want), "{name} in {dtype} of {:?} and {:?}", a.layout(), b.layout());
                    };
                    check("add", a.add(b), &|a, b| a + b, dtype);
                    check("mul", a.mul(b), &|a, b| a * b, dtype);
                    check("maximum", a.maximum(b), &f64::max, dtype);
                    check("minimum", a.minimum(b), &f64::min, dtype);
                    if dtype.is_float() {
                        check("sub", a.sub(b), &|a, b| a - b, dtype);
                    }
                    let lt = a.lt(b);
                    check("eq", a.eq(b), &|a, b| f64::from(a == b), DType::U8);
                    check("le", a.le(b), &|a, b| f64::from(a <= b), DType::U8);
                    check("where", lt.as_ref().unwrap().select(a, b), &f64::min, dtype);
                    check("lt", lt, &|a, b| f64::from(a < b), DType::U8);
                    let first = a.lt(&b.narrow(1, 0, 1).unwrap()).unwrap().narrow(1, 0, 1).unwrap();
                    let picked = first.select(a, b).unwrap().to_vec::<f64>().unwrap();
                    let c = first.expand(&shape).unwrap().to_vec::<f64>().unwrap();
                    assert!(picked.iter().enumerate().all(|(i, y)| *y == if c[i] != 0.0 { va[i] } else { vb[i] }), "where, of a broadcast condition");
                }
            }
        }
    }
}

#[test]
fn nan_is_in_no_order_and_negative_zero_is_zero() {
    for (dtype, _) in FLOATS {
        let t = |v: [f64; 4]| Tensor::from_vec(v, &[4]).unwrap().cast(dtype).unwrap();
        let (a, b) = (t([f64::NAN, 0.0, f64::INFINITY, -1.0]), t([f64::NAN, -0.0, f64::INFINITY, f64::NAN]));
        let bits = |y: Result<Tensor>| y.unwrap().to_vec::<u8>().unwrap();
        assert_eq!((bits(a.eq(&b)), bits(a.lt(&b)), bits(a.le(&b))), (vec![0, 1, 1, 0], vec![0; 4], vec![0, 1, 1, 0]), "{dtype}");
    }
}

#[test]
fn casts_between_all_dtypes() {
    let v = [0.0, 1.0, -1.0, 2.5, -2.5, 255.0, 256.0, 300.7, -300.7, 65535.0, 70_000.0, 2147483648.0, -3e9, 4294967296.0, 1e19, -1e19, f64::NAN];
    // over the length of a piece and of a task
    let v: Vec<f64> = v.iter().copied().cycle().take(40_001).collect();
    let saturate = |x: f64, to: DType| match to {
        DType::F64 => x,
        DType::F32 => f64::from(x as f32),
        DType::BF16 => <engine::half::bf16 as engine::Element>::from_f64(x).to_f64(),
        DType::F16 => <engine::half::f16 as engine::Element>::from_f64(x).to_f64(),
        DType::I64 => (x as i64) as f64,
        DType::I32 => f64::from(x as i32),
        DType::U32 => f64::from(x as u32),
        DType::U8 => f64::from(x as u8),
    };
    for from in ALL {
        let x = Tensor::from_vec(&v[..], &[v.len()]).unwrap().cast(from).unwrap();
        for to in ALL {
            let y = x.cast(to).unwrap();
            assert_eq!(y.dtype(), to);
            for (y, v) in y.to_vec::<f64>().unwrap().iter().zip(&v) {
                let want = saturate(saturate(*v, from), to);
                assert!(*y == want || (y.is_nan() && want.is_nan()), "{v:e} from {from} to {to}: {y:e}, not {want:e}");
            }
        }
    }
}

#[test]
fn integers_where_they_are_defined_and_refused_where_not() {
    for dtype in ALL.into_iter().filter(|d| !d.is_float()) {
        let x = small(&[3, 5], dtype, 1);
        let v = x.to_vec::<f64>().unwrap();
        let sorted = x.sort(false).unwrap().0;
        assert_eq!((sorted.dtype(), x.topk(2).unwrap().0.dtype(), x.argmax(1).unwrap().dtype()), (dtype, dtype, DType::I64));
        assert!(sorted.to_vec::<f64>().unwrap().chunks(5).all(|r| r.is_sorted()));
        let at = Tensor::from_vec([2i32, 0], &[2]).unwrap();
        assert_eq!(x.index_select(0, &at).unwrap().to_vec::<f64>().unwrap(), [&v[10..], &v[..5]].concat());
        assert_eq!(x.index_select(0, &at).unwrap().index_add(0, &at, 3).unwrap().to_vec::<f64>().unwrap()[10..], v[10..]);
        assert_eq!(Tensor::cat(&[&x, &x.pad(0, 1, 0).unwrap()], 0).unwrap().to_vec::<f64>().unwrap(), [&v[..], &[0.0; 5], &v].concat());
        for e in [
            x.exp(),
            x.sum_all(),
            x.mean(&[0], false),
            x.cumsum(0),
            x.softmax(1),
            x.div(&x),
            x.matmul(&x.transpose(0, 1).unwrap()),
            x.max(&[0], false),
        ] {
            let e = e.unwrap_err();
            assert!(matches!(e, Error::DType { found, .. } if found == dtype), "{e}");
        }
    }
    let wrap = Tensor::from_vec([250u8], &[1]).unwrap();
    assert_eq!(wrap.add(&wrap).unwrap().to_vec::<u8>().unwrap(), [244]);
}

#[test]
fn nothing_in_nothing_out() {
    let cpu = Device::cpu();
    for (dtype, _) in FLOATS {
        for shape in [[0, 3], [3, 0], [0, 0]] {
            let x = Tensor::zeros(&shape, dtype, &cpu).unwrap().requires_grad();
            let [r, c] = shape;
            let ids = |s: &[usize]| Tensor::zeros(s, DType::I64, &cpu).unwrap();
            let other = |s: &[usize]| Tensor::ones(s, dtype, &cpu).unwrap();
            let same: Vec<Result<Tensor>> = vec![
                x.neg(),
                x.silu(),
                x.pow(2.0),
                x.affine(2.0, 1.0),
                x.add(&other(&[c])),
                x.mul(&other(&[r, 1])),
                x.maximum(&x),
                x.le(&x).and_then(|m| m.select(&x, &x)),
                x.transpose(0, 1).and_then(|t| t.contiguous()).and_then(|t| t.transpose(0, 1)),
                x.softmax(0),
                x.softmax(1),
                x.log_softmax(1),
                x.cumsum(0),
                x.cumsum(1),
                x.sort(true).map(|s| s.0),
                x.gather(1, &ids(&[r, 0])).and_then(|t| Tensor::cat(&[&t, &x], 1)),
                x.scatter_add(1, &ids(&[r, c]), c),
                x.narrow(0, 0, r),
                x.expand(&[2, r, c]).and_then(|t| t.sum(&[0], false)),
                x.cast(DType::F64).and_then(|t| t.cast(dtype)),
            ];
            for (i, y) in same.into_iter().enumerate() {
                let y = y.unwrap_or_else(|e| panic!("{i} of {shape:?}: {e}"));
                assert_eq!((y.shape(), y.dtype()), (&shape[..], dtype), "{i}");
                let g = y.sum_all().unwrap().backward().unwrap_or_else(|e| panic!("backward of {i} of {shape:?}: {e}"));
                assert!(g.get(&x).is_none_or(|g| g.shape() == shape), "{i}");
            }
            let sized = [
                (x.sum(&[0], false), vec![c]),
                (x.sum(&[1], false), vec![r]),
                (x.mean(&[1], true), vec![r, 1]),
                (x.sum_all(), vec![]),
                (x.matmul(&other(&[c, 4])), vec![r, 4]),
                (other(&[5, r]).matmul(&x), vec![5, c]),
                (x.unsqueeze(0).and_then(|t| t.matmul(&other(&[2, c, 4]))), vec![2, r, 4]),
                (x.pad(1, 2, 1), vec![r, c + 3]),
                (Tensor::cat(&[&x, &other(&[2, c])], 0), vec![r + 2, c]),
                (x.topk(0).map(|t| t.0), vec![r, 0]),
                (x.index_select(0, &ids(&[0])), vec![0, c]),
                (x.index_add(0, &ids(&[r]), 4), vec![4, c]),
                (x.embedding(&ids(&[0, 2])), vec![0, 2, c]),
                (x.reshape(&[c, r]), vec![c, r]),
            ];
            for (i, (y, want)) in sized.into_iter().enumerate() {
                let y = y.unwrap_or_else(|e| panic!("{i} of {shape:?}: {e}"));
                assert_eq!(y.shape(), want, "{i}");
                y.sum_all().unwrap().backward().unwrap_or_else(|e| panic!("backward of {i} of {shape:?}: {e}"));
            }
            for part in [0, 1] {
                x.split(1, &[0, c]).unwrap()[part].sum_all().unwrap().backward().unwrap();
            }
            // there is no largest of nothing
            for axis in [0, 1] {
                let none = shape[axis] == 0;
                assert_eq!((x.max(&[axis], false).is_err(), x.argmax(axis).is_err()), (none, none), "axis {axis} of {shape:?}");
            }
            x.assign(&other(&shape)).unwrap();
        }
    }
}

#[test]
fn sizes_beyond_the_address_space_are_refused() {
    let cpu = Device::cpu();
    let one = Tensor::ones(&[1, 1], DType::F32, &cpu).unwrap();
    let huge = 1usize << 33;
    // views of one number
    let (tall, wide) = (one.expand(&[huge, 1]).unwrap(), one.expand(&[1, huge]).unwrap());
    let id = Tensor::zeros(&[1], DType::I64, &cpu).unwrap();
    let too_large = [
        tall.add(&wide),
        tall.lt(&wide),
        one.le(&one).and_then(|c| c.select(&tall, &wide)),
        tall.matmul(&wide),
        tall.expand(&[huge, huge]),
        Tensor::zeros(&[huge, huge], DType::U8, &cpu),
        Tensor::randn(&[huge, huge], DType::F64, &cpu, 0, 0),
        Tensor::from_vec([0u8; 0], &[huge, huge]),
        one.pad(0, usize::MAX - 1, 0),
        one.pad(1, huge, usize::MAX / 2),
        one.index_add(0, &id, usize::MAX),
        one.scatter_add(1, &Tensor::zeros(&[1, 1], DType::I64, &cpu).unwrap(), usize::MAX),
        one.reshape(&[usize::MAX, 2]),
        one.narrow(1, 1, usize::MAX),
        one.split(1, &[usize::MAX, 2]).map(|mut v| v.remove(0)),
    ];
    for (i, e) in too_large.into_iter().enumerate() {
        let e = e.map(|t| t.meta()).unwrap_err();
        assert!(matches!(e, Error::TooLarge { .. } | Error::Invalid { .. } | Error::OutOfMemory { .. }), "{i}: {e}");
    }
    // what fits an address but no machine
    for (i, e) in [tall.exp(), tall.contiguous(), tall.sum_all(), tall.cumsum(0), tall.cast(DType::F64), tall.transpose(0, 1)].into_iter().enumerate()
    {
        match e {
            Ok(t) => assert!(i == 5 && t.shape() == [1, huge]),
            Err(e) => assert!(matches!(e, Error::OutOfMemory { .. }), "{i}: {e}"),
        }
    }
}
