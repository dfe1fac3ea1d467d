//! A step that computes nothing and tells which kernels it would launch, so that they are compiled side by side instead of one after another at their first launches.

use crate::{Cuda, Kernel};
use engine::{Error, Result};
use std::collections::HashSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard};

#[derive(Default)]
pub(crate) struct Plan {
    on: AtomicBool,
    kernels: Mutex<HashSet<Kernel>>,
}

impl Plan {
    pub fn on(&self) -> bool {
        self.on.load(Ordering::Relaxed)
    }
    /// Notes a kernel.
    pub fn note(&self, k: &Kernel) {
        let mut kernels = self.kernels();
        if !kernels.contains(k) {
            kernels.insert(k.clone());
        }
    }
    fn kernels(&self) -> MutexGuard<'_, HashSet<Kernel>> {
        self.kernels.lock().unwrap_or_else(|e| e.into_inner())
    }
    /// What a plan can't answer.
    pub fn refuse(&self, what: &str) -> Result<()> {
        if self.on() { Err(Error::invalid("cuda plan", format!("{what} while a step is planned, which computes nothing"))) } else { Ok(()) }
    }
}

impl Cuda {
    /// Runs `step` without computing anything: memory is taken as usual, targets keep their values, new tensors hold garbage. Returns the kernels that it would
    /// have launched, for [`Cuda::prepare`], and what it returned. Reading a result is an error in it; what it would have done after that is not in the list,
    /// and is compiled when it is launched. No other thread may use the device meanwhile.
    pub fn plan<R>(&self, step: impl FnOnce() -> Result<R>) -> (Vec<Kernel>, Result<R>) {
        struct Off<'a>(&'a Plan);
        impl Drop for Off<'_> {
            fn drop(&mut self) {
                self.0.on.store(false, Ordering::Relaxed);
            }
        }
        let plan = self.planned();
        plan.kernels().clear();
        plan.on.store(true, Ordering::Relaxed);
        let off = Off(plan);
        let r = step();
        drop(off);
        let mut kernels: Vec<Kernel> = plan.kernels().drain().collect();
        kernels.sort_by_cached_key(|k| (k.to_string(), k.threads, k.min_blocks));
        (kernels, r)
    }
}
