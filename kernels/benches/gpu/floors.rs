//! The rates that ops are held against: those of libtorch on this GPU, taken in the same rounds.
//!
//! * **Memory**: a copy from one large tensor to another, its bytes read and written.
//! * **Products**: bf16 with sums in fp32 at shapes that are large in every direction; the fastest
//!   of them counts. The data sheet's figure would be no measure: at work on random numbers a GPU
//!   runs into the limit of its power and lowers its clocks.

use oxitron_kernels::Error;
use tch::{Kind, Tensor};

use crate::ops::Model;
use crate::place::{Place, torch};
use crate::suite::{Op, Suite, Work};

/// A large tensor of random numbers, and where they are copied to.
pub struct Copy {
    from: Tensor,
    to: Tensor,
}

impl Copy {
    /// # Errors
    /// [`Error::Torch`] if libtorch cannot allocate.
    pub fn new(place: Place, bytes: i64) -> Result<Copy, Error> {
        let elements = [bytes / 4];
        Ok(Copy {
            from: place.random(&elements, Kind::Float)?,
            to: place.output(&elements, Kind::Float)?,
        })
    }

    /// The same memory once more.
    pub fn share(&self) -> Copy {
        Copy {
            from: self.from.shallow_clone(),
            to: self.to.shallow_clone(),
        }
    }

    /// # Errors
    /// [`Error::Torch`] if libtorch refuses.
    pub fn run(&mut self) -> Result<(), Error> {
        self.to.f_copy_(&self.from).map_err(torch)
    }

    /// Bytes read and written.
    fn bytes(&self) -> f64 {
        (2 * 4 * self.from.numel()) as f64
    }
}

pub fn add_all(suite: &mut Suite, model: Model, place: Place, copy: &Copy) {
    let op = Op {
        name: "copy",
        shape: format!("{:.2} GB", 0.5e-9 * copy.bytes()),
        dtype: "fp32",
        work: Work::Bytes(copy.bytes()),
    };
    suite.add_floor(op, || {
        let mut copy = copy.share();
        Ok(move || copy.run())
    });
    let side = model.square;
    let gate_up = [model.tokens, model.hidden, 2 * model.inner];
    for [n, k, m] in [[side, side, side], [2 * side, side, 2 * side], gate_up] {
        let op = Op::product("product", [n, k, m], 2 * n * k * m);
        suite.add_floor(op, || {
            let x = place.random(&[n, k], Kind::BFloat16)?;
            let w = place.random(&[m, k], Kind::BFloat16)?;
            let y = place.output(&[n, m], Kind::BFloat16)?;
            let w = w.f_tr().map_err(torch)?;
            Ok(move || x.f_mm_out(&y, &w).map(drop).map_err(torch))
        });
    }
}
