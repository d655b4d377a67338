//! Who multiplies.

use std::cell::Cell;
use std::str::FromStr;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU8, Ordering};

use tch::Kind;

use crate::probe;
use crate::simd::{self, Level, level};

/// Who multiplies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Engine {
    /// [`crate::matmul`]. Same bits on any number of threads.
    Own = 1,
    /// MKL for fp32 and oneDNN for bf16, through libtorch. They may cut long sums differently for
    /// another number of threads.
    Libtorch = 2,
}

impl Engine {
    /// Every engine.
    pub const ALL: [Engine; 2] = [Engine::Own, Engine::Libtorch];

    /// The name under which a run records the choice.
    pub fn name(self) -> &'static str {
        match self {
            Engine::Own => "own",
            Engine::Libtorch => "libtorch",
        }
    }
}

impl FromStr for Engine {
    type Err = String;

    fn from_str(text: &str) -> Result<Engine, String> {
        let found = Engine::ALL.into_iter().find(|engine| engine.name() == text);
        found.ok_or_else(|| format!("products are by own or libtorch, not by {text:?}"))
    }
}

thread_local! {
    static FORCED: Cell<Option<Engine>> = const { Cell::new(None) };
}

/// The engine that [`Engine::choose`] named; 0 before.
static CHOSEN: AtomicU8 = AtomicU8::new(0);

impl Engine {
    /// The engine of products in a dtype, at the level in force: the faster one, if it is
    /// [known](Engine::known); elsewhere the one that the process [chose](Engine::choose), or else
    /// libtorch.
    pub fn of(kind: Kind) -> Engine {
        let chosen = CHOSEN.load(Ordering::Relaxed);
        let chosen = Engine::ALL
            .into_iter()
            .find(|&engine| engine as u8 == chosen);
        Engine::first(FORCED.get(), || Engine::known(kind), chosen)
    }

    /// What is forced, or else known, or else chosen.
    fn first(
        forced: Option<Engine>,
        known: impl FnOnce() -> Option<Engine>,
        chosen: Option<Engine>,
    ) -> Engine {
        let engine = forced.or_else(known).or(chosen);
        engine.unwrap_or(Engine::Libtorch)
    }

    /// The faster engine for a dtype on this processor, where measurements have settled it: the same
    /// in every run, which a measurement at the start would not be. `None` for bf16 on processors
    /// with AMX, whose two engines have not met.
    ///
    /// Measured on Zen 4 (2 cores, 2048 tokens, the 24 products of two models by `cargo bench --bench
    /// kernels`): in fp32 134–193 GFLOP/s by our own, 127–179 by libtorch, ours ahead by 8–47% in
    /// all but two; in bf16 297–411 and 232–418, ours between 9% behind and 44% ahead, before the
    /// passes over memory that only our own products save.
    pub fn known(kind: Kind) -> Option<Engine> {
        if level() == Level::Portable {
            Some(Engine::Libtorch)
        } else if kind == Kind::BFloat16 && tiles_are_unlimited() {
            None
        } else {
            Some(Engine::Own)
        }
    }

    /// Takes this engine, from now on and in the whole process, for products whose faster engine is
    /// not known.
    pub fn choose(self) {
        CHOSEN.store(self as u8, Ordering::Relaxed);
    }
}

/// Whether the processor has AMX, and nobody limits our own kernels, which libtorch would not obey.
fn tiles_are_unlimited() -> bool {
    static ANSWER: OnceLock<bool> = OnceLock::new();
    *ANSWER.get_or_init(|| probe::has_amx_bf16() && matches!(simd::requested(), Ok(None)))
}

/// Runs `body` with all products of this thread by one engine, for tests and measurements.
pub fn with_engine<R>(engine: Engine, body: impl FnOnce() -> R) -> R {
    /// Puts the former setting back, also when `body` panics.
    struct Restore(Option<Engine>);
    impl Drop for Restore {
        fn drop(&mut self) {
            FORCED.set(self.0);
        }
    }
    let _restore = Restore(FORCED.replace(Some(engine)));
    body()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;

    #[test]
    fn a_choice_counts_only_where_nothing_is_known() {
        let first = |forced, known, chosen| Engine::first(forced, || known, chosen);
        let (own, libtorch) = (Some(Engine::Own), Some(Engine::Libtorch));
        assert_eq!(first(None, None, None), Engine::Libtorch);
        assert_eq!(first(None, None, own), Engine::Own);
        assert_eq!(first(None, libtorch, own), Engine::Libtorch);
        assert_eq!(first(own, libtorch, libtorch), Engine::Own);
        for kind in [Kind::Float, Kind::BFloat16] {
            let portable = simd::with_level(Level::Portable, || Engine::of(kind));
            assert_eq!(portable, Engine::Libtorch);
            for forced in Engine::ALL {
                assert_eq!(with_engine(forced, || Engine::of(kind)), forced);
            }
        }
    }

    #[test]
    fn names_are_read_back() {
        for engine in Engine::ALL {
            assert_eq!(engine.name().parse(), Ok(engine));
        }
        assert!("mkl".parse::<Engine>().unwrap_err().contains("mkl"));
    }
}
