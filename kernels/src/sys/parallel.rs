//! A parallel loop on libtorch's own threads.
//!
//! libtorch's CPU kernels run on GNU OpenMP. A second pool (rayon, say) would fight them for the
//! cores and cost several microseconds per region; entering `GOMP_parallel` of the same libgomp
//! costs about one and finds the threads warm.
//!
//! A loop over `0..n` is cut into blocks of a fixed size, and each thread takes one contiguous run
//! of blocks. A kernel that computes each block by itself therefore gives the same bits on any
//! number of threads.

use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};

use libc::{c_int, c_uint, c_void};

use super::split::Split;

#[link(name = "gomp")]
unsafe extern "C" {
    fn GOMP_parallel(
        body: extern "C" fn(*mut c_void),
        data: *mut c_void,
        threads: c_uint,
        flags: c_uint,
    );
    fn omp_get_thread_num() -> c_int;
    fn omp_get_num_threads() -> c_int;
    fn omp_get_max_threads() -> c_int;
}

/// Threads that a loop started by the calling thread would use.
pub fn threads() -> usize {
    // SAFETY: reads a thread-local setting of OpenMP.
    let threads = unsafe { omp_get_max_threads() };
    usize::try_from(threads).unwrap_or(1).max(1)
}

/// One loop, as the threads of a team see it.
struct Job<F> {
    n: usize,
    grain: usize,
    blocks: usize,
    body: F,
}

/// Runs the calling thread's share of the [`Job`] that `data` points to.
extern "C" fn run_share<F: Fn(Range<usize>) + Sync>(data: *mut c_void) {
    // SAFETY: `parallel_for` passes its `Job<F>`, which outlives the region; access is shared.
    let job = unsafe { &*data.cast_const().cast::<Job<F>>() };
    // SAFETY: both read the calling thread's place in the current team.
    let (index, team) = unsafe { (omp_get_thread_num(), omp_get_num_threads()) };
    // OpenMP may give fewer threads than asked for, so the share follows the real team.
    let (index, team) = (index as usize, team as usize);
    let first = job.blocks * index / team * job.grain;
    let last = (job.blocks * (index + 1) / team * job.grain).min(job.n);
    if first < last {
        (job.body)(first..last);
    }
}

/// Runs `body` on consecutive ranges that together cover `0..n`, each range made of whole blocks
/// of `grain` items (the last block may be shorter). Each thread gets at most one range.
///
/// A panic in `body` aborts the process: it must not unwind through OpenMP.
pub fn parallel_for<F: Fn(Range<usize>) + Sync>(n: usize, grain: usize, body: F) {
    let grain = grain.max(1);
    let blocks = n.div_ceil(grain);
    // Always the whole team: libgomp ends and restarts threads when its size changes.
    let team = threads();
    if team <= 1 || blocks <= 1 {
        if n > 0 {
            body(0..n);
        }
        return;
    }
    let job = Job {
        n,
        grain,
        blocks,
        body,
    };
    let data = (&raw const job).cast_mut().cast::<c_void>();
    // SAFETY: `run_share::<F>` expects exactly this type, `job` lives until GOMP_parallel returns
    // (it joins the team), and `F: Sync` allows the shared calls.
    unsafe { GOMP_parallel(run_share::<F>, data, team as c_uint, 0) }
}

/// As [`parallel_for`], and hands each range its own part of `output`.
///
/// # Panics
/// If `output` has fewer parts than the loop has items: a mistake in the kernel that calls this,
/// never in a user's input, which [`super::operands`] has checked.
pub fn parallel_split<S: Split>(
    n: usize,
    grain: usize,
    output: S,
    body: impl Fn(Range<usize>, S::Part) + Sync,
) {
    assert!(output.covers(n), "the output does not cover the loop");
    parallel_for(n, grain, |range| {
        // SAFETY: `covers` held, and the ranges of one loop never overlap.
        let part = unsafe { output.part(range.clone()) };
        body(range, part);
    });
}

/// Tasks of one pass, handed out one by one in rising order.
pub(crate) struct Counter(AtomicUsize);

impl Counter {
    pub(crate) fn new() -> Self {
        Counter(AtomicUsize::new(0))
    }

    /// The next task that nobody has.
    pub(crate) fn claim(&self) -> usize {
        self.0.fetch_add(1, Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;
    use crate::sys::split::{Grid, Rows};
    use crate::testing::on_threads;

    #[test]
    fn every_item_is_visited_once_in_whole_blocks() {
        for threads in [1, 2, 3, 7] {
            on_threads(threads, || {
                for (n, grain) in [(0, 1), (1, 1), (10, 3), (100, 7), (1000, 1), (5, 100)] {
                    let mut visits = vec![0u32; n];
                    parallel_split(n, grain, Rows::new(&mut visits, 1), |range, part| {
                        assert_eq!(range.start % grain, 0);
                        assert!(range.end == n || range.end % grain == 0);
                        assert_eq!(range.len(), part.len());
                        part.iter_mut().for_each(|visit| *visit += 1);
                    });
                    assert!(
                        visits.iter().all(|&visit| visit == 1),
                        "{n} {grain}: {visits:?}"
                    );
                }
            });
        }
    }

    #[test]
    fn there_is_one_openmp_in_the_process() {
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        let mut libraries: Vec<&str> = maps
            .lines()
            .filter_map(|line| line.split_whitespace().nth(5))
            .filter(|path| path.contains("libgomp") || path.contains("libiomp"))
            .collect();
        libraries.sort_unstable();
        libraries.dedup();
        assert_eq!(
            libraries.len(),
            1,
            "two pools would fight for the cores: {libraries:?}"
        );
    }

    #[test]
    fn columns_and_short_last_rows_are_cut_right() {
        on_threads(3, || {
            let mut grid = vec![0usize; 5 * 9];
            parallel_split(
                9,
                2,
                Grid::new(&mut grid, 9).by_columns(),
                |columns, mut part| {
                    for r in 0..5 {
                        for (c, cell) in columns.clone().zip(part.row(r)) {
                            *cell += 100 * r + c;
                        }
                    }
                },
            );
            assert!(
                grid.iter()
                    .enumerate()
                    .all(|(i, &cell)| cell == 100 * (i / 9) + i % 9)
            );
            let mut flat = vec![0usize; 10];
            parallel_split(4, 1, Rows::new(&mut flat, 3), |range, part| {
                part.iter_mut()
                    .enumerate()
                    .for_each(|(i, x)| *x = 3 * range.start + i);
            });
            assert_eq!(flat, (0..10).collect::<Vec<_>>());
        });
    }
}
