//! The gate's activation and its derivative, over rows.

use super::super::{Activation, Gate};
use engine::{
    cpu::simd::{Real, dot, sum},
    vectorized,
};

vectorized! {
    /// `y = act(x)`; `x` and `y` have the same length.
    pub fn activate[F: Real](act: Activation, x: &[F], y: &mut [F]) {
        let half = F::from_f64(0.5);
        match act {
            Activation::Sigmoid => y.iter_mut().zip(x).for_each(|(y, x)| *y = x.sigmoid()),
            Activation::Silu => y.iter_mut().zip(x).for_each(|(y, x)| *y = x.silu()),
            Activation::NsSigmoid => y.iter_mut().zip(x).for_each(|(y, x)| *y = half.mul_add(x.sigmoid(), half)),
            Activation::Identity => y.copy_from_slice(x),
        }
    }

    /// `y = act'(x)`.
    pub fn slope[F: Real](act: Activation, x: &[F], y: &mut [F]) {
        let half = F::from_f64(0.5);
        match act {
            Activation::Sigmoid => y.iter_mut().zip(x).for_each(|(y, x)| { let s = x.sigmoid(); *y = s * (F::ONE - s) }),
            Activation::Silu => y.iter_mut().zip(x).for_each(|(y, x)| { let s = x.sigmoid(); *y = s * (*x * (F::ONE - s) + F::ONE) }),
            Activation::NsSigmoid => y.iter_mut().zip(x).for_each(|(y, x)| { let s = x.sigmoid(); *y = half * s * (F::ONE - s) }),
            Activation::Identity => y.fill(F::ONE),
        }
    }

    /// One row of the forward: `o = act(g) ⊙ u` or `u + act(g)`. `g` has u's length, or is one number for the row. `act` is scratch of g's length.
    pub fn apply[F: Real](gate: Gate, g: &[F], u: &[F], act: &mut [F], o: &mut [F]) {
        activate(gate.activation, g, act);
        match (g.len() == 1, gate.additive) {
            (true, false) => o.iter_mut().zip(u).for_each(|(o, u)| *o = *u * act[0]),
            (true, true) => o.iter_mut().zip(u).for_each(|(o, u)| *o = *u + act[0]),
            (false, false) => o.iter_mut().zip(u).zip(act).for_each(|((o, u), a)| *o = *u * *a),
            (false, true) => o.iter_mut().zip(u).zip(act).for_each(|((o, u), a)| *o = *u + *a),
        }
    }

    /// One row of the backward: from `dy` (in `du`) to `du`, the gradient of the ungated output, and `dg`, the gate logit's.
    /// `g`, `dg` and the scratch `act` have u's length or are one number for the row.
    pub fn apply_backward[F: Real](gate: Gate, g: &[F], u: &[F], act: &mut [F], du: &mut [F], dg: &mut [F]) {
        slope(gate.activation, g, act);
        match (g.len() == 1, gate.additive) {
            (true, false) => dg[0] = act[0] * dot(du, u),
            (true, true) => dg[0] = act[0] * sum(du),
            (false, false) => for i in 0..u.len() { dg[i] = act[i] * du[i] * u[i] },
            (false, true) => for i in 0..u.len() { dg[i] = act[i] * du[i] },
        }
        if !gate.additive {
            activate(gate.activation, g, act);
            if g.len() == 1 { du.iter_mut().for_each(|d| *d *= act[0]) } else { du.iter_mut().zip(act).for_each(|(d, a)| *d *= *a) }
        }
    }
}
