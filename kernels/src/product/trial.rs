//! Both engines on the products of a model, to see who is faster where nobody knows.

use std::time::{Duration, Instant};

use tch::{Device, Kind, Tensor};

use super::engine::{Engine, with_engine};
use crate::error::torch;
use crate::{Error, Workspace, linear};

const OP: &str = "product.trial";

/// Turns of each engine, after one that is not counted.
const TURNS: usize = 3;

/// Times of the products of some linear layers: forward, gradient of the input, gradient of the
/// weight.
#[derive(Clone, Copy, Debug, Default)]
pub struct Trial {
    /// By our own engine.
    pub own: Duration,
    /// By libtorch.
    pub libtorch: Duration,
}

impl Trial {
    /// Multiplies `rows` rows by weights `[o, i]` of `kind` with the threads of the caller, the
    /// engines in turns, and adds the least times up. What the model fuses to a product is left
    /// out, to the disadvantage of our own engine, and so are other ranks of the machine, which wait
    /// meanwhile.
    ///
    /// # Errors
    /// [`Error::Torch`] if libtorch cannot allocate the matrices.
    pub fn run(kind: Kind, rows: usize, weights: &[[usize; 2]]) -> Result<Trial, Error> {
        let mut trial = Trial::default();
        let mut workspace = Workspace::new(Device::Cpu);
        for &size in weights {
            let mut layer = Layer::new(kind, rows, size).map_err(torch(OP))?;
            let mut least = [Duration::MAX; 2];
            for turn in 0..=TURNS {
                for (engine, least) in Engine::ALL.into_iter().zip(&mut least) {
                    let begin = Instant::now();
                    with_engine(engine, || layer.multiply(&mut workspace))?;
                    if turn > 0 {
                        *least = begin.elapsed().min(*least);
                    }
                }
            }
            trial.own += least[0];
            trial.libtorch += least[1];
        }
        Ok(trial)
    }

    /// Who was faster.
    pub fn faster(&self) -> Engine {
        if self.own <= self.libtorch {
            Engine::Own
        } else {
            Engine::Libtorch
        }
    }
}

/// Operands and results of a linear layer.
struct Layer {
    x: Tensor,
    w: Tensor,
    y: Tensor,
    dx: Tensor,
    dw: Tensor,
}

impl Layer {
    fn new(kind: Kind, rows: usize, [o, i]: [usize; 2]) -> Result<Layer, tch::TchError> {
        // The time of a product does not depend on the numbers, as long as they are normal ones.
        let full = |rows: usize, columns: usize, kind| {
            Tensor::f_full([rows as i64, columns as i64], 0.01, (kind, Device::Cpu))
        };
        Ok(Layer {
            x: full(rows, i, kind)?,
            w: full(o, i, kind)?,
            y: full(rows, o, kind)?,
            dx: full(rows, i, kind)?,
            dw: full(o, i, Kind::Float)?,
        })
    }

    fn multiply(&mut self, workspace: &mut Workspace) -> Result<(), Error> {
        linear::forward(&self.x, &self.w, &mut self.y, workspace)?;
        linear::backward_input(&self.y, &self.w, &mut self.dx, workspace)?;
        linear::backward_weight(&self.y, &self.x, &mut self.dw, workspace)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;

    #[test]
    fn both_engines_are_timed_and_the_faster_one_is_named() {
        for kind in [Kind::Float, Kind::BFloat16] {
            let trial = Trial::run(kind, 8, &[[16, 8], [40, 24]]).unwrap();
            assert!(trial.own > Duration::ZERO && trial.libtorch > Duration::ZERO);
        }
        let [short, long] = [1, 2].map(Duration::from_secs);
        for (own, libtorch, faster) in [
            (short, long, Engine::Own),
            (short, short, Engine::Own),
            (long, short, Engine::Libtorch),
        ] {
            assert_eq!(Trial { own, libtorch }.faster(), faster);
        }
    }
}
