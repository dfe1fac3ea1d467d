//! Timing: warm-up, the peak of memory, then repetitions, each timed alone.

use cuda::{Cuda, Graph};
use engine::{Device, Result};
use std::time::{Duration, Instant};

/// Bytes written between two repetitions on a GPU, so that none finds its inputs in the L2 cache: several times the 50 to 60 MB of a Hopper.
const FLUSH: usize = 256 << 20;
/// Time for one measurement where no number of repetitions is asked for.
const BUDGET: Duration = Duration::from_secs(2);

/// How work on a device is timed.
pub(crate) struct Clock {
    device: Device,
    /// How often; as often as fits the budget if none.
    reps: Option<usize>,
    /// Replay a captured graph instead of launching kernel by kernel.
    graph: bool,
}

/// What came of it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Times {
    /// Milliseconds.
    pub median: f64,
    pub min: f64,
    pub reps: usize,
    /// Bytes: the most that tensors took at once, inputs included.
    pub peak: usize,
}

fn ms(d: Duration) -> f64 {
    d.as_secs_f64() * 1e3
}

/// The middle of some numbers, or the mean of the two in the middle; 0 of none.
pub(crate) fn median(x: &mut [f64]) -> f64 {
    x.sort_by(f64::total_cmp);
    let n = x.len();
    if n == 0 { 0.0 } else { (x[(n - 1) / 2] + x[n / 2]) / 2.0 }
}

/// Counts the peak of memory from here on.
pub(crate) fn reset_peak(device: &Device) {
    match Cuda::of(device) {
        Ok(c) => c.reset_peak(),
        Err(_) => engine::cpu::reset_peak(),
    }
}
/// The most bytes that tensors took at once since then.
pub(crate) fn peak(device: &Device) -> usize {
    Cuda::of(device).map_or_else(|_| engine::cpu::memory().2, |c| c.stats().peak)
}

/// What the tables say about caches.
pub(crate) fn flush_note(device: &Device) -> &'static str {
    match Cuda::of(device) {
        Ok(c) if !c.is_emulator() => "L2 is flushed between repetitions (256 MiB are written)",
        _ => "caches are warm",
    }
}

impl Clock {
    pub fn new(device: &Device, reps: Option<usize>, graph: bool) -> Clock {
        Clock { device: device.clone(), reps, graph }
    }

    /// Times `f`, which is run twice before: once so that kernels are compiled and memory is there, once to see the peak of memory.
    pub fn time(&self, mut f: impl FnMut() -> Result<()>) -> Result<Times> {
        let device = self.device.backend();
        f()?;
        device.synchronize()?;
        reset_peak(&self.device);
        let start = Instant::now();
        f()?;
        device.synchronize()?;
        let peak = peak(&self.device);
        let fit = BUDGET.as_secs_f64() / start.elapsed().as_secs_f64().max(1e-6);
        let reps = self.reps.unwrap_or(fit.clamp(5.0, 100.0) as usize);
        let mut all = match Cuda::of(&self.device) {
            Ok(cuda) => self.on_cuda(cuda, reps, &mut f)?,
            Err(_) => (0..reps)
                .map(|_| {
                    let start = Instant::now();
                    f()?;
                    Ok(ms(start.elapsed()))
                })
                .collect::<Result<Vec<f64>>>()?,
        };
        Ok(Times { median: median(&mut all), min: all[0], reps, peak })
    }

    /// By the device's own clock: events before and after what `f` submits.
    fn on_cuda(&self, cuda: &Cuda, reps: usize, f: &mut dyn FnMut() -> Result<()>) -> Result<Vec<f64>> {
        let graph = if self.graph { Some(Graph::capture(&self.device, 1, &mut *f)?) } else { None };
        let flush = if cuda.is_emulator() { None } else { Some(cuda.scratch(FLUSH)?) };
        let mut all = vec![];
        for i in 0..reps {
            if let Some((_, at)) = &flush {
                cuda.fill(*at, i as u8, FLUSH)?;
            }
            let ((), took) = match &graph {
                Some(g) => cuda.time(|| g.replay())?,
                None => cuda.time(&mut *f)?,
            };
            all.push(ms(took));
        }
        Ok(all)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use engine::{DType, Tensor};

    #[test]
    fn medians() {
        assert_eq!(median(&mut [3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&mut [4.0, 1.0, 2.0, 3.0]), 2.5);
        assert_eq!(median(&mut []), 0.0);
    }

    /// Where memory is measured, and that as much is repeated as was asked for, launched or replayed.
    #[test]
    fn work_is_repeated_and_its_memory_seen() {
        // the CPU's memory is counted over all tests of this process, each of which may count anew: x itself is there in any case
        let devices = [(Some(Device::cpu()), 1), (cuda::emulator_with_memory(1 << 24).ok(), 3)];
        for (device, tensors) in devices.into_iter().filter_map(|(d, n)| Some((d?, n))) {
            let x = Tensor::ones(&[1 << 16], DType::F32, &device).unwrap();
            let mut n = 0;
            let t = Clock::new(&device, Some(3), false)
                .time(|| {
                    n += 1;
                    x.add(&x)?.add(&x).map(drop)
                })
                .unwrap();
            assert_eq!((n, t.reps), (5, 3));
            assert!(t.peak >= tensors << 18 && t.min > 0.0 && t.min <= t.median, "{t:?}");
            if device != Device::cpu() {
                let mut n = 0;
                let count = || {
                    n += 1;
                    x.add(&x).map(drop)
                };
                assert_eq!(Clock::new(&device, Some(3), true).time(count).unwrap().reps, 3);
                assert_eq!(n, 4, "two warm-ups, the graph's own, and its capture");
            }
        }
    }
}
