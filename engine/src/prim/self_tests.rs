//! Self-tests of the primitive ops, against themselves in f64 on the CPU (whose gradients the tests compare with central differences).

use crate::{DType, Result, Tensor, self_test};

/// A ragged matrix: full vectors and a rest.
const M: [usize; 2] = [37, 131];

fn ints(x: &Tensor, modulo: usize, n: usize) -> Result<Tensor> {
    let v: Vec<i64> = (0..n).map(|i| (i * 7 % modulo) as i64).collect();
    Tensor::from_vec(v, &[n])?.to_device(x.device())
}

self_test!("elementwise functions", [M], |x| {
    let x = &x[0];
    let away = x.square()?.affine(1.0, 0.5)?; // where ln, √ and 1/x are tame
    let plain =
        [x.neg(), x.exp(), x.square(), x.abs(), x.relu(), x.sigmoid(), x.silu(), x.softplus(), x.tanh(), x.sin(), x.cos(), x.affine(2.0, 1.0)];
    plain.into_iter().chain([away.ln(), away.sqrt(), away.rsqrt(), away.recip(), away.pow(1.7)]).collect()
});
self_test!("elementwise arithmetic", [M, [131], [37, 1]], |x| {
    let (a, b, c) = (&x[0], &x[1], &x[2].square()?.affine(1.0, 0.5)?);
    [a.add(b), a.sub(b), a.mul(b), a.div(c), a.maximum(b), a.minimum(b), a.lt(b)?.select(a, b)].into_iter().collect()
});
self_test!("cast", [M], |x| Ok(vec![x[0].cast(DType::F32)?.cast(DType::F64)?]));
self_test!("matmul", [[2, 37, 65], [65, 41], [2, 29, 37]], |x| {
    let y = x[0].matmul(&x[1])?;
    Ok(vec![x[2].matmul(&y)?.transpose(1, 2)?, x[2].transpose(1, 2)?.matmul(&x[2])?])
});
self_test!("linear of a master weight", [[2, 37, 65], [41, 65]], |x| {
    let master = if x[1].dtype().size() == 2 { x[1].cast(DType::F32)? } else { x[1].clone() };
    Ok(vec![x[0].linear(&master)?])
});
self_test!("reductions", [[5, 37, 65]], |x| {
    let x = &x[0];
    [x.sum(&[2], false), x.sum(&[0, 2], true), x.mean(&[1], false), x.max(&[2], false), x.cumsum(2), x.cumsum(1)].into_iter().collect()
});
self_test!("softmax", [M], |x| Ok(vec![x[0].softmax(1)?, x[0].log_softmax(1)?, x[0].softmax(0)?]));
self_test!("indexing", [M, [37, 20]], |x| {
    let rows = ints(&x[0], 37, 90)?;
    let picks = ints(&x[0], 131, 37 * 20)?.reshape(&[37, 20])?;
    Ok(vec![x[0].index_select(0, &rows)?, x[0].gather(1, &picks)?, x[1].scatter_add(1, &picks, 131)?, x[0].embedding(&rows)?])
});
self_test!("sorting", [M], |x| Ok(vec![x[0].topk(5)?.0, x[0].sort(true)?.0]));
self_test!("shapes", [M, [37, 3]], |x| {
    Ok(vec![Tensor::cat(&[&x[0], &x[1]], 1)?, x[0].pad(1, 2, 1)?, x[0].transpose(0, 1)?.narrow(0, 3, 40)?.contiguous()?, x[1].sum_to(&[1, 3])?])
});

#[cfg(test)]
mod tests {
    use crate::{DType, Device, SelfTest, Tensor, self_tests};

    #[test]
    fn primitives_pass_their_self_tests() {
        for t in self_tests() {
            let e = t.run(&Device::cpu(), DType::F32).unwrap();
            assert!(e > 0.0 || ["sorting", "shapes", "cast"].contains(&t.name), "{} compares nothing", t.name);
            assert!(e <= 1e-5, "{}: {e:e}", t.name);
        }
    }

    #[test]
    fn a_wrong_op_fails_its_self_test() {
        let wrong = SelfTest { name: "wrong", shapes: &[&[4]], op: |x| Ok(vec![x[0].sin()?]), reference: Some(|x| Ok(vec![x[0].tanh()?])) };
        assert!(wrong.run(&Device::cpu(), DType::F32).unwrap() > 1e-2);
        let cut = SelfTest { op: |x| Ok(vec![x[0].detach().sin()?]), reference: Some(|x| Ok(vec![x[0].sin()?])), ..wrong };
        assert!(cut.run(&Device::cpu(), DType::F32).is_err());
        let nan: fn(&[Tensor]) -> crate::Result<Vec<Tensor>> = |x| Ok(vec![x[0].affine(f64::NAN, 0.0)?]);
        assert!(SelfTest { op: nan, ..cut }.run(&Device::cpu(), DType::F32).unwrap().is_infinite());
    }
}
