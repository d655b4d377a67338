#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
use super::*;
use crate::testing::*;
use tch::Kind;

#[test]
fn a_tensor_elsewhere_is_refused() {
    let mut claims = Claims::new("linear_glu.forward", Device::Cuda(1));
    let y = zeros(&[4], Kind::BFloat16);
    let error = claims
        .dense("y", &y, Kind::BFloat16, &[4], true)
        .unwrap_err();
    let expected = "linear_glu.forward: `y` must be on Cuda(1), found Cpu; move it there first";
    assert_eq!(error.to_string(), expected);
}

#[test]
fn sparse_undefined_and_misaligned_tensors_are_refused() {
    let dense = zeros(&[4, 4], Kind::Float);
    let sparse = dense.to_sparse(None, None::<&[i64]>, 0);
    assert!(
        as_slice::<f32>(&sparse)
            .unwrap_err()
            .to_string()
            .contains("is sparse")
    );
    assert!(
        as_slice::<f32>(&Tensor::new())
            .unwrap_err()
            .to_string()
            .contains("undefined")
    );
    let bytes = [0u8; 64];
    // SAFETY: the tensor does not outlive `bytes`, which has 4 * 4 bytes after the offset.
    let odd =
        unsafe { Tensor::from_blob(bytes.as_ptr().add(1), &[4], &[1], Kind::Float, Device::Cpu) };
    let aligned = (bytes.as_ptr() as usize + 1).is_multiple_of(4);
    assert_eq!(as_slice::<f32>(&odd).is_ok(), aligned);
}

#[test]
fn slices_are_the_memory_of_the_tensor() {
    let mut x = zeros(&[2, 3], Kind::Float);
    as_mut_slice::<f32>(&mut x).unwrap()[5] = 7.0;
    assert_eq!(x.double_value(&[1, 2]), 7.0);
    assert!(as_slice::<f64>(&x).is_err());
    assert!(as_slice::<f32>(&x.tr()).is_err());
    let empty = zeros(&[0, 3], Kind::BFloat16);
    assert!(as_slice::<half::bf16>(&empty).unwrap().is_empty());
}

#[test]
fn reads_may_overlap_and_writes_may_not() {
    let x = zeros(&[8], Kind::Float);
    let mut operands = Operands::new("test");
    operands.read::<f32>("a", &x, &[8]).unwrap();
    let mut part = x.narrow(0, 2, 3);
    operands.read::<f32>("b", &part, &[3]).unwrap();
    let error = operands.write::<f32>("c", &mut part, &[3]).unwrap_err();
    assert!(
        matches!(
            error,
            Error::Overlap {
                first: "a",
                second: "c",
                ..
            }
        ),
        "{error}"
    );
}
