//! The checks that an op's arguments go through, and the memory that they lay claim to.

use tch::{Device, Kind, Tensor};

use super::check_shape;
use crate::Error;
use crate::error::torch;

/// Most tensors that one op takes.
const MOST: usize = 12;

/// Memory of an argument.
#[derive(Clone, Copy)]
pub(super) struct Span {
    pub(super) name: &'static str,
    pub(super) start: usize,
    pub(super) end: usize,
    pub(super) written: bool,
}

/// The arguments of one call, all on one device: what memory they have, and who writes.
pub(crate) struct Claims {
    op: &'static str,
    device: Device,
    spans: [Option<Span>; MOST],
}

impl Claims {
    /// Starts the check of a call to `op`, whose tensors lie on `device`.
    pub(crate) fn new(op: &'static str, device: Device) -> Self {
        Claims {
            op,
            device,
            spans: [None; MOST],
        }
    }

    pub(crate) fn op(&self) -> &'static str {
        self.op
    }

    /// A contiguous tensor of exactly this shape: its number of elements.
    pub(crate) fn dense(
        &mut self,
        name: &'static str,
        tensor: &Tensor,
        kind: Kind,
        shape: &[usize],
        written: bool,
    ) -> Result<usize, Error> {
        self.check(name, tensor, kind, shape)?;
        if !tensor.is_contiguous() {
            return Err(self.layout(name, tensor, "contiguous"));
        }
        let len = shape.iter().product();
        self.claim(name, tensor, kind, len, written)?;
        Ok(len)
    }

    /// A matrix whose rows may lie apart but are dense: elements from the first to the last, and from
    /// one row to the next.
    pub(crate) fn matrix(
        &mut self,
        name: &'static str,
        tensor: &Tensor,
        kind: Kind,
        [rows, columns]: [usize; 2],
        written: bool,
    ) -> Result<(usize, usize), Error> {
        self.check(name, tensor, kind, &[rows, columns])?;
        if rows * columns == 0 {
            return Ok((0, columns));
        }
        let strides = tensor.stride();
        let stride = if rows == 1 {
            columns
        } else {
            usize::try_from(strides[0]).unwrap_or(0)
        };
        if (columns > 1 && strides[1] != 1) || stride < columns {
            return Err(self.layout(name, tensor, "dense within a row, rows apart or adjacent"));
        }
        let len = (rows - 1) * stride + columns;
        self.claim(name, tensor, kind, len, written)?;
        Ok((len, stride))
    }

    /// A tensor `[rows, heads, dim]` whose rows may lie apart but are dense: elements of a row, and
    /// from one row to the next.
    pub(crate) fn heads(
        &mut self,
        name: &'static str,
        tensor: &Tensor,
        kind: Kind,
        shape @ [rows, heads, dim]: [usize; 3],
        written: bool,
    ) -> Result<(usize, usize), Error> {
        self.check(name, tensor, kind, &shape)?;
        let (width, strides) = (heads * dim, tensor.stride());
        let stride = usize::try_from(strides[0]).unwrap_or(0);
        let dense_row = (dim <= 1 || strides[2] == 1) && (heads <= 1 || strides[1] == dim as i64);
        if !dense_row || (rows > 1 && stride < width) {
            return Err(self.layout(name, tensor, "dense within a row, rows apart or adjacent"));
        }
        if rows * width > 0 {
            let len = (rows - 1) * stride + width;
            self.claim(name, tensor, kind, len, written)?;
        }
        Ok((width, stride))
    }

    /// Refuses a tensor elsewhere, or of another dtype or shape.
    pub(super) fn check(
        &self,
        name: &'static str,
        tensor: &Tensor,
        expected: Kind,
        shape: &[usize],
    ) -> Result<(), Error> {
        let found = check_dtype(self.op, name, tensor)?;
        if tensor.device() != self.device {
            return Err(Error::Device {
                op: self.op,
                tensor: name,
                expected: self.device,
                found: tensor.device(),
            });
        }
        if found != expected {
            return Err(Error::Dtype {
                op: self.op,
                tensor: name,
                expected,
                found,
            });
        }
        check_shape(self.op, name, tensor, shape)
    }

    /// Notes the memory of an argument and refuses an overlap that involves a write.
    fn claim(
        &mut self,
        name: &'static str,
        tensor: &Tensor,
        kind: Kind,
        len: usize,
        written: bool,
    ) -> Result<(), Error> {
        if len == 0 {
            return Ok(());
        }
        let (start, size) = (tensor.data_ptr() as usize, kind.elt_size_in_bytes());
        if !start.is_multiple_of(size) {
            return Err(self.layout(name, tensor, "aligned to its element size"));
        }
        self.claim_span(Span {
            name,
            start,
            end: start + len * size,
            written,
        })
    }

    pub(super) fn claim_span(&mut self, span: Span) -> Result<(), Error> {
        for slot in &mut self.spans {
            match slot {
                Some(other) => {
                    let overlap = span.start < other.end && other.start < span.end;
                    if overlap && (span.written || other.written) {
                        return Err(Error::Overlap {
                            op: self.op,
                            first: other.name,
                            second: span.name,
                        });
                    }
                }
                None => {
                    *slot = Some(span);
                    return Ok(());
                }
            }
        }
        Err(Error::Argument {
            op: self.op,
            message: format!("more than {MOST} tensors"),
        })
    }

    pub(super) fn layout(
        &self,
        name: &'static str,
        tensor: &Tensor,
        expected: &'static str,
    ) -> Error {
        Error::Layout {
            op: self.op,
            tensor: name,
            expected,
            shape: tensor.size(),
            strides: tensor.stride(),
        }
    }
}

/// The dtype of a tensor that a kernel could read, on whatever device.
///
/// # Errors
/// [`Error::Argument`] for an undefined tensor or one in a layout without strides.
pub(crate) fn check_dtype(
    op: &'static str,
    name: &'static str,
    tensor: &Tensor,
) -> Result<Kind, Error> {
    if !tensor.defined() {
        return Err(Error::Argument {
            op,
            message: format!("`{name}` is an undefined tensor"),
        });
    }
    let dtype = tensor.f_kind().map_err(torch(op))?;
    if tensor.is_sparse() || tensor.is_mkldnn() {
        let message = format!("`{name}` is sparse or in a library's own layout; make it dense");
        return Err(Error::Argument { op, message });
    }
    Ok(dtype)
}
