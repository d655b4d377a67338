//! Steps that stand out of the steps before them.
//!
//! A rolling window holds loss and gradient norm of the last accepted steps. A step whose loss or
//! gradient norm lies too many standard deviations above the window's mean is a spike: large
//! batches of broken text, or the beginning of a divergence. What is done about one is
//! [`BadSteps`](super::BadSteps)'.
//!
//! The window gives a step its limits before it begins. Whoever knows loss and gradient norm first,
//! which may be a device far from here, compares them, and the window hears later of a step that it
//! was accepted, or says how one that was refused stood out.
//!
//! # Rules
//! - Nothing is a spike before the window holds a quarter of its size, and at least
//!   [`FEWEST_STEPS`]: a mean of a few steps says nothing, and early training moves fast.
//! - Only upward: a loss that falls is what training is for.
//! - The standard deviation (of the window as a whole population) counts as at least
//!   [`FLATTEST`] of the mean's size: in a flat window the smallest noise would stand out.
//! - A spike does not enter the window, or the next one would look normal beside it.
//! - What is not finite is a spike whatever the window holds.
//!
//! Mean and deviation are computed anew from the window at each step, in its order. So the verdict
//! is a function of the figures in the window alone: the same on every rank, and the same after a
//! resume, since the window goes through a checkpoint bit for bit.

use std::collections::VecDeque;
use std::fmt;

use oxitron_kernels::decision::Limits;
use serde::{Deserialize, Serialize};

use crate::config::GuardConfig;

/// The fewest steps that a step is compared with.
pub const FEWEST_STEPS: usize = 16;

/// The least standard deviation, as a share of the mean's size.
pub const FLATTEST: f64 = 1e-3;

/// Finds spikes in the figures of a run.
#[derive(Clone, Debug, PartialEq)]
pub struct Spikes {
    /// The most steps in the window.
    window: usize,
    /// Standard deviations from which on a step stands out.
    zscore: f64,
    state: SpikeState,
}

/// The window: what a checkpoint keeps of [`Spikes`]. All figures are finite.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SpikeState {
    /// Mean losses of the accepted steps, the oldest first.
    loss: VecDeque<f64>,
    /// Gradient norms of the same steps.
    grad_norm: VecDeque<f64>,
}

/// How a step stands out.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Spike {
    /// By which figure; where both stand out, the one that does more.
    pub figure: Figure,
    /// The figure of this step.
    pub value: f64,
    /// Mean of the window.
    pub mean: f64,
    /// Standard deviations above the mean; infinite for what is not finite.
    pub z: f64,
    /// Steps in the window.
    pub steps: usize,
}

/// A figure of a step that is watched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Figure {
    /// Mean loss over the valid targets.
    Loss,
    /// Norm of the gradient before clipping.
    GradNorm,
}

impl Spikes {
    /// With an empty window.
    pub fn new(config: &GuardConfig) -> Self {
        Self {
            window: config.spike_window,
            zscore: config.spike_zscore,
            state: SpikeState::default(),
        }
    }

    /// What the next step may not exceed, or it stands out: infinite while there are too few steps
    /// to compare it with. Clips nothing.
    pub fn limits(&self) -> Limits {
        let limit = |window: &VecDeque<f64>| {
            if !self.has_enough() {
                return f64::INFINITY;
            }
            let (mean, deviation) = level(window);
            mean + self.zscore * deviation
        };
        Limits {
            clip_norm: 0.0,
            loss: limit(&self.state.loss),
            grad_norm: limit(&self.state.grad_norm),
        }
    }

    /// Takes a step into the window that has not exceeded its limits.
    pub fn accept(&mut self, loss: f64, grad_norm: f64) {
        self.state.push(loss, grad_norm, self.window);
    }

    /// How a step stands out that has exceeded its limits or is not finite.
    pub fn spike(&self, loss: f64, grad_norm: f64) -> Spike {
        let spike = |figure, value: f64, window: &VecDeque<f64>| {
            let (mean, deviation) = level(window);
            let z = match value - mean {
                _ if !value.is_finite() => f64::INFINITY,
                // Nothing finite stands out of too few steps.
                _ if !self.has_enough() => 0.0,
                above if deviation > 0.0 => above / deviation,
                // A window of zeros has no scale at all: whatever is above it stands out.
                above if above > 0.0 => f64::INFINITY,
                _ => 0.0,
            };
            Spike {
                figure,
                value,
                mean,
                z,
                steps: window.len(),
            }
        };
        let by_loss = spike(Figure::Loss, loss, &self.state.loss);
        let by_norm = spike(Figure::GradNorm, grad_norm, &self.state.grad_norm);
        if by_norm.z > by_loss.z {
            by_norm
        } else {
            by_loss
        }
    }

    /// Whether the window holds enough steps to compare another one with.
    fn has_enough(&self) -> bool {
        self.state.loss.len() >= FEWEST_STEPS.max(self.window.div_ceil(4))
    }

    /// Empties the window: where a stage begins, loss and gradient norm begin a level of their own.
    pub fn clear(&mut self) {
        self.state = SpikeState::default();
    }

    /// The window, for a checkpoint.
    pub fn state(&self) -> &SpikeState {
        &self.state
    }

    /// Takes over the window of a checkpoint; of one that is longer than the configured window, the
    /// newest steps.
    pub fn restore(&mut self, state: SpikeState) {
        self.clear();
        for (loss, grad_norm) in state.loss.into_iter().zip(state.grad_norm) {
            self.state.push(loss, grad_norm, self.window);
        }
    }
}

impl SpikeState {
    fn push(&mut self, loss: f64, grad_norm: f64, most: usize) {
        self.loss.push_back(loss);
        self.grad_norm.push_back(grad_norm);
        while self.loss.len() > most {
            self.loss.pop_front();
            self.grad_norm.pop_front();
        }
    }
}

/// Mean of a window and its standard deviation, which counts as at least a share of the mean.
fn level(window: &VecDeque<f64>) -> (f64, f64) {
    let count = window.len().max(1) as f64;
    let mean = window.iter().sum::<f64>() / count;
    let squares = window.iter().map(|figure| (figure - mean).powi(2));
    let deviation = (squares.sum::<f64>() / count).sqrt();
    (mean, deviation.max(FLATTEST * mean.abs()))
}

impl fmt::Display for Figure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Loss => "loss",
            Self::GradNorm => "gradient norm",
        })
    }
}

impl fmt::Display for Spike {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            figure,
            value,
            mean,
            z,
            steps,
        } = self;
        if !value.is_finite() {
            return write!(f, "the {figure} is not finite ({value})");
        }
        write!(
            f,
            "the {figure} {value:.4} is {z:.1} standard deviations above {mean:.4}, the mean of \
             {steps} accepted steps"
        )
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]

    use super::*;
    use proptest::prelude::*;

    fn spikes(window: usize, zscore: f64) -> Spikes {
        Spikes {
            window,
            zscore,
            state: SpikeState::default(),
        }
    }

    /// Loss 2 ± 0.1 and gradient norm 1 ± 0.1, in turns.
    fn settled(window: usize) -> Spikes {
        let mut spikes = spikes(window, 6.0);
        for step in 0..window {
            let sign = if step % 2 == 0 { 1.0 } else { -1.0 };
            let verdict = observe(&mut spikes, 2.0 + 0.1 * sign, 1.0 - 0.1 * sign);
            assert_eq!(verdict, None);
        }
        spikes
    }

    /// Decides as a step does, and follows it.
    fn observe(spikes: &mut Spikes, loss: f64, grad_norm: f64) -> Option<Spike> {
        let limits = spikes.limits();
        let finite = loss.is_finite() && grad_norm.is_finite();
        if !finite || loss > limits.loss || grad_norm > limits.grad_norm {
            return Some(spikes.spike(loss, grad_norm));
        }
        spikes.accept(loss, grad_norm);
        None
    }

    fn spike(found: Option<Spike>) -> Spike {
        found.expect("it should stand out")
    }

    #[test]
    fn what_lies_too_far_above_the_mean_stands_out() {
        let mut spikes = settled(64);
        assert_eq!(observe(&mut spikes, 2.59, 1.59), None);
        let mut spikes = settled(64);
        let loss = spike(observe(&mut spikes, 2.61, 1.0));
        assert_eq!((loss.figure, loss.steps), (Figure::Loss, 64));
        assert!((loss.mean - 2.0).abs() < 1e-12 && (loss.z - 6.1).abs() < 1e-9);
        assert_eq!(
            spike(observe(&mut spikes, 2.0, 1.7)).figure,
            Figure::GradNorm
        );
        // The one that stands out more is named.
        assert_eq!(
            spike(observe(&mut spikes, 2.7, 3.0)).figure,
            Figure::GradNorm
        );
        assert_eq!(spike(observe(&mut spikes, 5.0, 1.7)).figure, Figure::Loss);
        let text = spike(observe(&mut spikes, 2.7, 1.0)).to_string();
        assert_eq!(
            text,
            "the loss 2.7000 is 7.0 standard deviations above 2.0000, the mean of 64 accepted steps"
        );
    }

    #[test]
    fn a_spike_does_not_enter_the_window() {
        let mut spikes = settled(32);
        let before = spikes.state().clone();
        for _ in 0..100 {
            spike(observe(&mut spikes, 9.0, 1.0));
        }
        assert_eq!(spikes.state(), &before);
        assert_eq!(observe(&mut spikes, 2.0, 1.0), None);
        assert_ne!(spikes.state(), &before);
    }

    #[test]
    fn downward_is_never_a_spike() {
        let mut spikes = settled(32);
        assert_eq!(observe(&mut spikes, -100.0, 0.0), None);
    }

    #[test]
    fn a_quarter_of_the_window_is_needed() {
        for (window, needed) in [(16, 16), (64, 16), (128, 32), (130, 33)] {
            let mut spikes = spikes(window, 6.0);
            for step in 0..needed {
                // Far out, but with too little to compare it with.
                let verdict = observe(&mut spikes.clone(), 1e6, 1e6);
                assert_eq!(verdict, None, "window {window}, step {step}");
                assert_eq!(observe(&mut spikes, 2.0, 1.0), None);
            }
            spike(observe(&mut spikes, 1e6, 1.0));
        }
    }

    #[test]
    fn noise_in_a_flat_window_is_no_spike() {
        let mut flat = spikes(16, 6.0);
        for _ in 0..16 {
            assert_eq!(observe(&mut flat, 2.0, 0.5), None);
        }
        assert_eq!(observe(&mut flat.clone(), 2.01, 0.502), None);
        spike(observe(&mut flat, 2.013, 0.5));
        let mut zeros = spikes(16, 6.0);
        for _ in 0..16 {
            assert_eq!(observe(&mut zeros, 0.0, 0.0), None);
        }
        assert_eq!(observe(&mut zeros, 0.0, 0.0), None);
        assert_eq!(spike(observe(&mut zeros, 1e-9, 0.0)).z, f64::INFINITY);
    }

    #[test]
    fn what_is_not_finite_stands_out_from_the_start() {
        for bad in [f64::NAN, f64::INFINITY] {
            let mut empty = spikes(16, 6.0);
            let found = spike(observe(&mut empty, 2.0, bad));
            assert_eq!((found.figure, found.z), (Figure::GradNorm, f64::INFINITY));
            assert!(found.to_string().contains("not finite"), "{found}");
            spike(observe(&mut empty, bad, 2.0));
            assert_eq!(empty.state(), &SpikeState::default());
        }
    }

    #[test]
    fn the_noise_of_ordinary_training_is_no_spike() {
        let mut spikes = spikes(128, 6.0);
        let mut noise = vec![0.0; 20_000];
        oxitron_kernels::philox::fill_normal(&mut noise, 3, "noise", 0, 1.0);
        for (step, pair) in noise.chunks(2).enumerate() {
            let level = 2.0 + 8.0 / (1.0 + step as f64 / 50.0);
            let (loss, norm) = (
                level + 0.05 * f64::from(pair[0]),
                1.0 + 0.1 * f64::from(pair[1]),
            );
            assert_eq!(observe(&mut spikes, loss, norm), None, "step {step}");
        }
    }

    #[test]
    fn a_shorter_window_keeps_the_newest_steps() {
        let long = settled(64);
        let mut short = spikes(16, 6.0);
        short.restore(long.state().clone());
        assert_eq!(short.state(), settled(16).state());
        short.clear();
        assert_eq!(short.state(), &SpikeState::default());
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        /// Through the JSON of a checkpoint at any place: the same verdicts and the same bits.
        #[test]
        fn a_resumed_window_judges_alike(
            figures in prop::collection::vec((0.1f64..4.0, 1e-30f64..1e30), 1..200),
            at: prop::sample::Index,
            window in 16usize..64,
            zscore in 0.5f64..4.0,
        ) {
            let at = at.index(figures.len());
            let mut straight = spikes(window, zscore);
            let mut first = spikes(window, zscore);
            for &(loss, norm) in &figures[..at] {
                observe(&mut straight, loss, norm);
                observe(&mut first, loss, norm);
            }
            let stored = serde_json::to_string(first.state()).unwrap();
            let mut resumed = spikes(window, zscore);
            resumed.restore(serde_json::from_str(&stored).unwrap());
            prop_assert_eq!(&resumed, &straight);
            for &(loss, norm) in &figures[at..] {
                prop_assert_eq!(observe(&mut resumed, loss, norm), observe(&mut straight, loss, norm));
            }
            prop_assert_eq!(&resumed, &straight);
        }

        /// A limit is exceeded by what lies more than that many standard deviations above the mean,
        /// up to the rounding of the two, and the figure named is one that does.
        #[test]
        fn limits_are_a_matter_of_standard_deviations(
            figures in prop::collection::vec((0.1f64..4.0, 1e-3f64..1e3), 20..100),
            scale in -20i32..20,
            zscore in 0.5f64..4.0,
        ) {
            let mut spikes = spikes(20, zscore);
            for (loss, norm) in figures {
                let norm = norm * 10f64.powi(scale);
                let (limits, spike) = (spikes.limits(), spikes.spike(loss, norm));
                let refused = loss > limits.loss || norm > limits.grad_norm;
                if (spike.z / zscore - 1.0).abs() > 1e-9 {
                    prop_assert_eq!(refused, spike.z > zscore);
                    let named = match spike.figure {
                        Figure::Loss => loss > limits.loss,
                        Figure::GradNorm => norm > limits.grad_norm,
                    };
                    prop_assert_eq!(named, refused);
                }
                spikes.accept(loss, norm);
            }
        }

        /// The window holds the last accepted steps, and the unit of a figure does not matter.
        #[test]
        fn the_window_holds_what_was_accepted(
            figures in prop::collection::vec((0.1f64..4.0, 0.1f64..4.0), 1..200),
            window in 16usize..64,
            zscore in 0.5f64..4.0,
        ) {
            let mut plain = spikes(window, zscore);
            let mut scaled = spikes(window, zscore);
            let mut accepted = Vec::new();
            for (loss, norm) in figures {
                let verdict = observe(&mut plain, loss, norm);
                // A power of two scales without rounding.
                let other = observe(&mut scaled, loss * 1024.0, norm / 64.0);
                prop_assert_eq!(verdict.is_none(), other.is_none());
                if verdict.is_none() {
                    accepted.push((loss, norm));
                }
                let newest = &accepted[accepted.len().saturating_sub(window)..];
                let state = plain.state();
                let held = state.loss.iter().copied().zip(state.grad_norm.iter().copied());
                prop_assert!(held.eq(newest.iter().copied()));
            }
        }
    }
}
