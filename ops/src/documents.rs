//! Packed documents: `cu_seqlens` holds where each begins, and where the last ends.

use engine::cpu::Inputs;
use engine::{DType, Error, Meta, Result};

/// Checks shape and dtype of a `cu_seqlens` input.
pub(crate) fn check_meta(op: &'static str, cu: &Meta, batch: usize) -> Result<()> {
    if cu.shape.len() != 1 || cu.shape[0] < 2 {
        return Err(Error::shape(op, "cu_seqlens", "[documents + 1]", &cu.shape));
    }
    if !matches!(cu.dtype, DType::I32 | DType::I64) {
        return Err(Error::dtype(op, "cu_seqlens", "i32 or i64", cu.dtype));
    }
    if batch != 1 {
        return Err(Error::invalid(op, format!("cu_seqlens needs batch 1 (all documents packed into one row), found batch {batch}")));
    }
    Ok(())
}

/// The bounds as usize, checked: 0 = first ≤ … ≤ last = t.
pub(crate) fn read(op: &'static str, x: &Inputs, i: usize, t: usize) -> Result<Vec<usize>> {
    let v: Vec<i64> = match x.dtype(i) {
        DType::I32 => x.slice::<i32>(i)?.iter().map(|v| *v as i64).collect(),
        _ => x.slice::<i64>(i)?.to_vec(),
    };
    let ok = v.first() == Some(&0) && v.last() == Some(&(t as i64)) && v.windows(2).all(|w| w[0] <= w[1]);
    if !ok {
        let shown = &v[..v.len().min(16)];
        return Err(Error::invalid(op, format!("cu_seqlens must rise from 0 to the packed length {t}, found {shown:?} ({} numbers)", v.len())));
    }
    Ok(v.into_iter().map(|v| v as usize).collect())
}
