//! Panics of other people's code, as errors.

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind, set_hook, take_hook};
use std::sync::Once;

thread_local! {
    /// Whether a panic of this thread will be caught, so that nobody need be told of it.
    static CAUGHT: Cell<bool> = const { Cell::new(false) };
}

/// What `f` gives; or what it panicked with, which is not printed. For a library that takes what a file says for granted: it reads past its tables where
/// the file lies. `f` must leave nothing half-changed behind that is used afterwards.
pub(super) fn caught<T>(f: impl FnOnce() -> T) -> Result<T, String> {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let told = take_hook();
        set_hook(Box::new(move |info| {
            if !CAUGHT.get() {
                told(info);
            }
        }));
    });
    let before = CAUGHT.replace(true);
    let out = catch_unwind(AssertUnwindSafe(f));
    CAUGHT.set(before);
    out.map_err(|e| match (e.downcast_ref::<String>(), e.downcast_ref::<&str>()) {
        (Some(said), _) => said.clone(),
        (_, Some(said)) => said.to_string(),
        _ => "it panicked".into(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn panics_are_told() {
        assert_eq!(caught(|| 3), Ok(3));
        assert_eq!(caught(|| [1, 2][std::hint::black_box(7)]).unwrap_err(), "index out of bounds: the len is 2 but the index is 7");
        assert_eq!(caught(|| panic!("why")).unwrap_err(), "why");
        // one in another that is caught does not end the quiet of the outer one
        assert_eq!(caught(|| caught(|| panic!("in")).unwrap_err() + &caught(|| panic!("side")).unwrap_err()).unwrap(), "inside");
        assert!(!CAUGHT.get());
    }
}
