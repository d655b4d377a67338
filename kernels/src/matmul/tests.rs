#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
use half::bf16;

use super::epilogue::{AddTo, Store};
use super::*;
use crate::simd::{Level, level, with_level};
use crate::testing::{on_threads, uniform};

mod epilogues;

/// Numbers in T, given by a name.
fn numbers<T: Float>(name: &str, n: usize) -> Vec<T> {
    uniform(name, n).into_iter().map(T::from_f32).collect()
}

fn wide<T: Float>(x: &[T]) -> Vec<f64> {
    x.iter().map(|x| f64::from(x.to_f32())).collect()
}

/// Relative error in norm; zero if both are.
fn error(found: &[f64], expected: &[f64]) -> f64 {
    assert_eq!(found.len(), expected.len());
    let norm = |x: &mut dyn Iterator<Item = f64>| x.map(|x| x * x).sum::<f64>().sqrt();
    let difference = norm(&mut found.iter().zip(expected).map(|(f, e)| f - e));
    let reference = norm(&mut expected.iter().copied());
    if difference == 0.0 {
        0.0
    } else {
        difference / reference
    }
}

/// A matrix `[rows, columns]` in one of its two forms, with gaps of NaN between the rows in memory.
struct Operand64<T> {
    data: Vec<T>,
    turned: bool,
    rows: usize,
    columns: usize,
    gap: usize,
}

impl<T: Float> Operand64<T> {
    fn new(name: &str, turned: bool, [rows, columns]: [usize; 2], gap: usize) -> Self {
        let (n, d) = if turned {
            (columns, rows)
        } else {
            (rows, columns)
        };
        let mut data = numbers::<T>(name, n * (d + gap));
        for row in data.chunks_exact_mut((d + gap).max(1)) {
            row[d..].fill(T::from_f32(f32::NAN));
        }
        Operand64 {
            data,
            turned,
            rows,
            columns,
            gap,
        }
    }

    fn matrix(&self) -> Matrix<'_, T> {
        let [n, d] = if self.turned {
            [self.columns, self.rows]
        } else {
            [self.rows, self.columns]
        };
        let rows = Strided {
            data: &self.data,
            stride: d + self.gap,
            n,
            d,
        };
        if self.turned {
            Matrix::Turned(rows)
        } else {
            Matrix::Rows(rows)
        }
    }

    fn at(&self, r: usize, c: usize) -> f64 {
        let at = if self.turned {
            c * (self.rows + self.gap) + r
        } else {
            r * (self.columns + self.gap) + c
        };
        f64::from(self.data[at].to_f32())
    }
}

/// `A · B` in f64, row by row.
fn product64<T: Float>(a: &Operand64<T>, b: &Operand64<T>) -> Vec<f64> {
    let mut c = vec![0.0; a.rows * b.columns];
    for r in 0..a.rows {
        for k in 0..a.columns {
            let x = a.at(r, k);
            for column in 0..b.columns {
                c[r * b.columns + column] += x * b.at(k, column);
            }
        }
    }
    c
}

/// `A · B` by the level in force, or by emulated tiles.
fn multiply_by<T: Dtype + Tiled, E: Epilogue>(
    tiles: bool,
    packed: bool,
    a: &Operand64<T>,
    b: &Operand64<T>,
    columns: Columns,
    epilogue: &E,
) {
    let (k, matrix) = (b.rows, b.matrix());
    let mut buffer = vec![f32::NAN; packed_len::<T>(k, columns)];
    let shape = Shape {
        rows: a.rows,
        k,
        columns,
        packed,
    };
    let mut scratch = vec![f32::NAN; scratch_len::<T>(shape)];
    if tiles {
        T::with_tiles(a.matrix(), matrix, columns, packed, epilogue);
        return;
    }
    let right = if packed {
        Right::Packed(pack(matrix, columns, &mut buffer).unwrap())
    } else {
        Right::Plain(matrix, columns)
    };
    multiply(a.matrix(), right, epilogue, &mut scratch).unwrap();
}

/// What AMX multiplies, by its emulation.
trait Tiled: Float {
    fn with_tiles<E: Epilogue>(
        a: Matrix<'_, Self>,
        b: Matrix<'_, Self>,
        columns: Columns,
        packed: bool,
        epilogue: &E,
    );
}

impl Tiled for f32 {
    fn with_tiles<E: Epilogue>(_: Matrix<'_, f32>, _: Matrix<'_, f32>, _: Columns, _: bool, _: &E) {
        unreachable!("AMX has no fp32 products");
    }
}

impl Tiled for bf16 {
    fn with_tiles<E: Epilogue>(
        a: Matrix<'_, bf16>,
        b: Matrix<'_, bf16>,
        columns: Columns,
        packed: bool,
        epilogue: &E,
    ) {
        use crate::microkernel::amx::{Tiles, emulated::Emulated};
        let kernel = Tiles(Emulated);
        let mut scratch = vec![f32::NAN; 1 << 20];
        let mut buffer = vec![f32::NAN; operands::buffer_len::<bf16>(b.rows(), columns)];
        let right = if packed {
            operands::pack(kernel, b, columns, &mut buffer).unwrap();
            Right::Packed(Packed::new(&buffer, b.rows(), columns))
        } else {
            Right::Plain(b, columns)
        };
        run::run(kernel, a, right, epilogue, &mut scratch).unwrap();
    }
}

/// Every way to multiply T, each with a name.
fn for_each_way<T: Tiled>(mut f: impl FnMut(&str, bool)) {
    for limit in Level::ALL {
        with_level(limit, || {
            if level() == limit {
                f(limit.name(), false);
            } else {
                eprintln!("{} is absent here", limit.name());
            }
        });
    }
    if size_of::<T>() == 2 && cfg!(target_arch = "x86_64") {
        f("emulated tiles", true);
    }
}

const SIZES: [[usize; 3]; 12] = [
    [1, 1, 1],
    [7, 16, 17],
    [1, 33, 130],
    [16, 17, 16],
    [33, 7, 1],
    [17, 257, 130],
    [130, 33, 257],
    [64, 600, 48],
    [257, 130, 33],
    [40, 1025, 70],
    [3, 2, 300],
    [96, 513, 16],
];

fn agrees<T: Dtype + Tiled>() {
    for [rows, k, n] in SIZES {
        for form in 0..8 {
            let (turn_a, turn_b, packed) = (form & 1 == 1, form & 2 == 2, form & 4 == 4);
            let gap = [0, 3, 32][form % 3];
            let a = Operand64::<T>::new("a", turn_a, [rows, k], gap);
            let b = Operand64::<T>::new("b", turn_b, [k, n], gap);
            let expected = product64(&a, &b);
            for_each_way::<T>(|way, tiles| {
                // Sums in fp32 show that only the products were rounded; a gap shows that nothing
                // else was written.
                let stride = n + gap;
                let mut c = vec![7f32; rows * stride];
                let target = Target::new(&mut c, [rows, n], stride).unwrap();
                multiply_by(tiles, packed, &a, &b, Columns::Any(n), &Store(target));
                let mut found = Vec::new();
                for row in c.chunks_exact(stride) {
                    found.extend_from_slice(&row[..n]);
                    assert!(row[n..].iter().all(|&x| x == 7.0), "wrote past a row");
                }
                let error = error(&wide(&found), &expected);
                assert!(error < 1e-5, "{way} [{rows}, {k}, {n}] {form}: {error:e}");
            });
        }
    }
}

#[test]
fn fp32_products_agree_with_fp64_at_every_level() {
    agrees::<f32>();
}

#[test]
fn bf16_products_agree_with_fp64_at_every_level() {
    agrees::<bf16>();
}

/// What a product of these sizes gives on some threads, as bits.
fn bits_on<T: Dtype + Tiled>(threads: usize, [rows, k, n]: [usize; 3], form: usize) -> Vec<u32> {
    on_threads(threads, move || {
        let a = Operand64::<T>::new("a", form & 1 == 1, [rows, k], 0);
        let b = Operand64::<T>::new("b", form & 2 == 2, [k, n], 0);
        let mut c = vec![0.5f32; rows * n];
        let target = Target::new(&mut c, [rows, n], n).unwrap();
        multiply_by(
            false,
            form & 4 == 4,
            &a,
            &b,
            Columns::Any(n),
            &AddTo(target),
        );
        c.into_iter().map(f32::to_bits).collect()
    })
}

#[test]
fn same_bits_on_any_number_of_threads() {
    for (form, sizes) in [
        (0, [257, 700, 130]),
        (1, [130, 1030, 257]),
        (2, [5, 530, 300]),
        (3, [33, 1000, 70]),
        (6, [300, 40, 520]),
    ] {
        let one = (
            bits_on::<bf16>(1, sizes, form),
            bits_on::<f32>(1, sizes, form),
        );
        for threads in [2, 3, 5] {
            assert!(
                one.0 == bits_on::<bf16>(threads, sizes, form),
                "{sizes:?} {threads}"
            );
            assert!(
                one.1 == bits_on::<f32>(threads, sizes, form),
                "{sizes:?} {threads}"
            );
        }
    }
}

#[test]
fn a_packed_weight_gives_the_same_bits() {
    for sizes in [[200, 530, 70], [3, 100, 40]] {
        for form in 0..4 {
            let plain = bits_on::<bf16>(2, sizes, form);
            assert!(
                plain == bits_on::<bf16>(2, sizes, form + 4),
                "{sizes:?} {form}"
            );
        }
    }
}

#[test]
fn products_of_nothing_are_zero() {
    for [rows, k, n] in [[3, 0, 20], [0, 5, 4], [4, 5, 0], [0, 0, 0]] {
        for packed in [false, true] {
            let a = Operand64::<bf16>::new("a", false, [rows, k], 0);
            let b = Operand64::<bf16>::new("b", true, [k, n], 0);
            let mut c = vec![3f32; rows * n];
            let target = Target::new(&mut c, [rows, n], n).unwrap();
            multiply_by(false, packed, &a, &b, Columns::Any(n), &Store(target));
            assert!(c.iter().all(|&x| x == 0.0), "[{rows}, {k}, {n}]: {c:?}");
        }
    }
}

#[test]
fn arguments_that_do_not_fit_are_refused() {
    let a = Operand64::<f32>::new("a", false, [40, 30], 0);
    let b = Operand64::<f32>::new("b", false, [30, 50], 0);
    let columns = Columns::Any(50);
    let shape = Shape {
        rows: 40,
        k: 30,
        columns,
        packed: false,
    };
    let len = scratch_len::<f32>(shape);
    let mut c = vec![0f32; 40 * 50];
    let mut run = |a: Matrix<'_, f32>, b: Right<'_, f32>, len: usize, rows: usize| {
        let target = Target::new(&mut c, [rows, 50], 50).unwrap();
        multiply(a, b, &Store(target), &mut vec![0.0; len]).map_err(|error| error.to_string())
    };
    let plain = Right::Plain(b.matrix(), columns);
    assert_eq!(run(a.matrix(), plain, len, 40), Ok(()));
    let says = |result: Result<(), String>, words: &str| {
        let message = result.unwrap_err();
        assert!(message.contains(words), "{message}");
    };
    says(run(a.matrix(), plain, 100, 40), "scratch must hold");
    says(run(a.matrix(), plain, len, 39), "must have shape [40, 50]");
    says(run(b.matrix(), plain, len, 30), "A has 50 columns");
    let any = Right::Plain(b.matrix(), Columns::Any(51));
    says(run(a.matrix(), any, len, 40), "described as");
    let short = Matrix::Rows(Strided {
        data: &a.data[1..],
        stride: 30,
        n: 40,
        d: 30,
    });
    says(run(short, plain, len, 40), "do not lie in 1199");
    let buffer = vec![0f32; 100];
    let packed = Right::Packed(Packed::new(&buffer, 30, columns));
    says(run(a.matrix(), packed, len, 40), "packed B must hold");
    assert!(pack(b.matrix(), columns, &mut [0.0; 100]).is_err());
    assert!(Target::new(&mut c, [40, 51], 50).is_err());
    assert!(Target::new(&mut [0f32; 100], [2, 51], 60).is_err());
}

#[test]
fn columns_of_groups_and_halves_are_all_there_once() {
    for columns in [
        Columns::Any(50),
        Columns::Groups {
            count: 3,
            width: 24,
        },
        Columns::Groups {
            count: 2,
            width: 32,
        },
        Columns::Halves { width: 40 },
        Columns::Halves { width: 1 },
        Columns::Any(0),
    ] {
        let mut seen = vec![0; columns.count()];
        let mut panels = 0;
        for run in columns.runs(0..columns.panels()) {
            assert_eq!(run.panel, panels);
            assert_eq!(run.columns.len().div_ceil(16), run.panels);
            panels += run.panels;
            seen[run.columns].iter_mut().for_each(|seen| *seen += 1);
        }
        assert_eq!(panels, columns.panels());
        assert!(seen.iter().all(|&seen| seen == 1), "{columns:?}");
    }
}
