//! A watch names the kernel, the place and the pass where numbers stop being finite.

use engine::watch::{Watched, place, watch};
use engine::{Result, Tensor, checkpoint};

fn leaf(v: &[f32]) -> Tensor {
    Tensor::from_vec(v, &[v.len()]).unwrap().requires_grad()
}
/// Two layers; `op` is the second's.
fn run(x: &Tensor, op: impl Fn(&Tensor) -> Result<Tensor>) -> Watched {
    let forward_and_backward = || {
        place(|| "layer 1".into());
        let h = x.affine(1.0, 0.0)?;
        place(|| "layer 2".into());
        let h = op(&h)?;
        place(|| "loss".into());
        h.sum_all()?.backward()
    };
    let (grads, seen) = watch(forward_and_backward);
    grads.unwrap();
    seen
}
fn text(o: Option<engine::watch::Origin>) -> String {
    o.map_or("-".into(), |o| o.to_string())
}

#[test]
fn forward_and_backward_are_told_apart() {
    assert_eq!(run(&leaf(&[1.0, 4.0]), Tensor::sqrt), Watched::default());
    let seen = run(&leaf(&[1.0, -4.0]), Tensor::sqrt);
    assert_eq!((text(seen.infinity), text(seen.nan)), ("-".into(), "`sqrt` in `layer 2` (forward)".into()));
    // finite in the forward, with an infinite slope: the backward's kernel, at the place of its forward
    let seen = run(&leaf(&[1.0, 0.0]), Tensor::sqrt);
    assert_eq!((text(seen.infinity), text(seen.nan)), ("`unary_backward` in `layer 2` (backward)".into(), "-".into()));
}

#[test]
fn an_infinity_before_it_does_not_hide_nan() {
    let seen = run(&leaf(&[0.0, 1.0]), |h| {
        let infinite = h.ln()?;
        place(|| "layer 3".into());
        infinite.sub(&infinite)
    });
    assert_eq!((text(seen.infinity), text(seen.nan)), ("`ln` in `layer 2` (forward)".into(), "`sub` in `layer 3` (forward)".into()));
}

#[test]
fn what_a_checkpoint_computes_again_is_watched_too() {
    let seen = run(&leaf(&[1.0, 0.0]), |h| Ok(checkpoint(|x| Ok(vec![x[0].sqrt()?]), &[h])?.remove(0)));
    assert_eq!(text(seen.infinity), "`unary_backward` in `layer 2` (backward)");
}

#[test]
fn nothing_is_seen_outside_of_a_watch() {
    leaf(&[-1.0]).sqrt().unwrap();
    assert_eq!(watch(|| ()).1, Watched::default());
}
