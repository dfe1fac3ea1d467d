//! Where numbers first stop being finite: a watch over the kernels that one thread launches, in the forward and in the backward.

use crate::{Result, Tensor};
use std::cell::RefCell;
use std::fmt;
use std::sync::Arc;

/// A kernel, and the part of the model that it ran for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Origin {
    /// The op's name.
    pub op: &'static str,
    /// What [`place`] had said when the op ran; in a backward, when the forward ran that it is the backward of.
    pub place: Option<Arc<str>>,
    /// Whether it ran for a backward.
    pub backward: bool,
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let pass = if self.backward { "backward" } else { "forward" };
        match &self.place {
            Some(place) => write!(f, "`{}` in `{place}` ({pass})", self.op),
            None => write!(f, "`{}` ({pass})", self.op),
        }
    }
}

/// What a watch saw. The two are apart because an infinity may be meant (a mask, a decay that forgets everything), and NaN never is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Watched {
    /// The first kernel whose output held an infinity.
    pub infinity: Option<Origin>,
    /// The first kernel whose output held NaN.
    pub nan: Option<Origin>,
}

#[derive(Default)]
struct State {
    place: Option<Arc<str>>,
    backward: bool,
    seen: Watched,
}

thread_local! { static STATE: RefCell<Option<State>> = const { RefCell::new(None) } }

/// Runs `f`, reads every kernel's output, and tells where the first numbers came up that aren't finite. Kernels that other threads launch are not seen.
pub fn watch<R>(f: impl FnOnce() -> R) -> (R, Watched) {
    struct Restore(Option<State>);
    impl Drop for Restore {
        fn drop(&mut self) {
            STATE.set(self.0.take());
        }
    }
    let _restore = Restore(STATE.replace(Some(State::default())));
    let r = f();
    (r, STATE.take().unwrap_or_default().seen)
}

/// Says which part of a model this thread computes from here on. Costs nothing when nobody watches.
pub fn place(name: impl FnOnce() -> String) {
    STATE.with_borrow_mut(|s| {
        if let Some(s) = s {
            s.place = Some(name().into());
        }
    });
}

/// The place in force, for the tape to remember.
pub(crate) fn current() -> Option<Arc<str>> {
    STATE.with_borrow(|s| s.as_ref()?.place.clone())
}

/// Until the guard is dropped this thread runs the backward of what was recorded at places given to [`Sweep::at`].
pub(crate) fn sweep() -> Sweep {
    Sweep(STATE.with_borrow_mut(|s| s.as_mut().map(|s| (s.place.clone(), std::mem::replace(&mut s.backward, true)))))
}

pub(crate) struct Sweep(Option<(Option<Arc<str>>, bool)>);

impl Sweep {
    pub fn at(&self, place: &Option<Arc<str>>) {
        STATE.with_borrow_mut(|s| {
            if let Some(s) = s {
                s.place.clone_from(place);
            }
        });
    }
}

impl Drop for Sweep {
    fn drop(&mut self) {
        STATE.with_borrow_mut(|s| {
            if let (Some(s), Some((place, backward))) = (s, self.0.take()) {
                (s.place, s.backward) = (place, backward);
            }
        });
    }
}

/// Looks at what a kernel wrote, if anybody watches. An error is the device's, which tells of what ran before when it is waited for.
pub(crate) fn check(op: &'static str, y: &[Tensor]) -> Result<()> {
    if STATE.with_borrow(|s| s.is_none()) {
        return Ok(());
    }
    let values = y.iter().filter(|t| t.dtype().is_float()).map(|t| t.to_vec::<f64>()).collect::<Result<Vec<_>>>()?.concat();
    STATE.with_borrow_mut(|s| {
        let Some(s) = s else { return };
        let origin = || Origin { op, place: s.place.clone(), backward: s.backward };
        if s.seen.infinity.is_none() && values.iter().any(|x| x.is_infinite()) {
            s.seen.infinity = Some(origin());
        }
        if s.seen.nan.is_none() && values.iter().any(|x| x.is_nan()) {
            s.seen.nan = Some(origin());
        }
    });
    Ok(())
}
