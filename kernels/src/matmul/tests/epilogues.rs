//! Epilogues against plain f64 code.

use super::super::epilogue::{AddResidual, Gate, GeluTanh, Glu, GluGradient, Rope, Silu};
use super::*;

/// What rounding to T may cost, as a relative norm.
fn bound<T>() -> f64 {
    if size_of::<T>() == 2 { 4e-3 } else { 1e-5 }
}

/// Rows of `width` numbers with `gap` numbers of 7 after each.
struct Output<T> {
    data: Vec<T>,
    shape: [usize; 2],
    gap: usize,
}

impl<T: Float> Output<T> {
    fn new(rows: usize, columns: usize, gap: usize) -> Self {
        Output {
            data: vec![T::from_f32(7.0); rows * (columns + gap)],
            shape: [rows, columns],
            gap,
        }
    }

    fn target(&mut self) -> Target<'_, T> {
        Target::new(&mut self.data, self.shape, self.shape[1] + self.gap).unwrap()
    }

    /// The numbers without the gaps, which must be as they were.
    fn numbers(&self) -> Vec<f64> {
        let mut numbers = Vec::new();
        for row in self.data.chunks_exact(self.shape[1] + self.gap) {
            let (inside, gap) = row.split_at(self.shape[1]);
            assert!(gap.iter().all(|x| x.to_f32() == 7.0), "wrote past a row");
            numbers.extend(wide(inside));
        }
        numbers
    }
}

fn close<T>(what: &str, found: &[f64], expected: &[f64]) {
    let error = error(found, expected);
    assert!(error < bound::<T>(), "{what}: {error:e}");
}

fn stores_and_sums<T: Dtype + Tiled>() {
    let [rows, k, n] = [67, 40, 85];
    let a = Operand64::<T>::new("a", false, [rows, k], 2);
    let b = Operand64::<T>::new("b", true, [k, n], 0);
    let product = product64(&a, &b);
    for_each_way::<T>(|way, tiles| {
        let mut c = Output::<T>::new(rows, n, 5);
        let store = Store(c.target());
        multiply_by(tiles, false, &a, &b, Columns::Any(n), &store);
        close::<T>(way, &c.numbers(), &product);
        // Added to itself: twice the product, rounded once more.
        let add = AddTo(c.target());
        multiply_by(tiles, true, &a, &b, Columns::Any(n), &add);
        let twice: Vec<f64> = product.iter().map(|x| 2.0 * x).collect();
        close::<T>(way, &c.numbers(), &twice);

        // The residual stream has a dtype of its own.
        let stream = uniform("stream", rows * (n + 3));
        let residual = Strided {
            data: &stream,
            stride: n + 3,
            n: rows,
            d: n,
        };
        let mut out = Output::<f32>::new(rows, n, 1);
        let add = AddResidual {
            residual,
            out: out.target(),
        };
        multiply_by(tiles, false, &a, &b, Columns::Any(n), &add);
        let expected: Vec<f64> = (0..rows * n)
            .map(|at| product[at] + f64::from(stream[at / n * (n + 3) + at % n]))
            .collect();
        close::<f32>(way, &out.numbers(), &expected);
    });
}

#[test]
fn sums_are_stored_and_added() {
    stores_and_sums::<f32>();
    stores_and_sums::<bf16>();
}

fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

/// The argument of a gate's sigmoid and its derivative.
type Argument = fn(f64) -> [f64; 2];

const SILU: Argument = |x| [x, 1.0];
const GELU: Argument = |x| {
    let scale = (8.0 / std::f64::consts::PI).sqrt();
    [
        scale * (x + 0.044715 * x.powi(3)),
        scale * (1.0 + 3.0 * 0.044715 * x * x),
    ]
};

fn gated<T: Dtype + Tiled>(gate_of: impl Gate, argument: Argument) {
    for [n, h, i] in [[1, 8, 1], [37, 24, 50], [70, 520, 96], [5, 7, 16]] {
        let mut x = Operand64::<T>::new("x", false, [n, h], 0);
        // Wide enough to reach both flat ends of the sigmoid.
        for x in &mut x.data {
            *x = T::from_f32(x.to_f32() * 4.0);
        }
        let w = Operand64::<T>::new("w", true, [h, 2 * i], 1);
        let product = product64(&x, &w);
        let dy = Operand64::<T>::new("dy", false, [n, h], 0);
        let down = Operand64::<T>::new("down", false, [h, i], 0);
        let d_gated = product64(&dy, &down);
        for_each_way::<T>(|way, tiles| {
            let what = format!("{way} [{n}, {h}, {i}]");
            let mut gate_up = Output::<T>::new(n, 2 * i, 3);
            let mut gated = Output::<T>::new(n, i, 2);
            let forward = Glu {
                gate: gate_of,
                gate_up: gate_up.target(),
                gated: gated.target(),
            };
            let columns = Columns::Halves { width: i };
            multiply_by(tiles, n > 40, &x, &w, columns, &forward);
            let both = gate_up.numbers();
            close::<T>(&what, &both, &product);
            // From the rounded numbers, so only one rounding is left.
            let gate = |at: usize| both[at / i * 2 * i + at % i];
            let up = |at: usize| both[at / i * 2 * i + i + at % i];
            let expected: Vec<f64> = (0..n * i)
                .map(|at| gate(at) * sigmoid(argument(gate(at))[0]) * up(at))
                .collect();
            close::<T>(&what, &gated.numbers(), &expected);

            let mut d_gate_up = Output::<T>::new(n, 2 * i, 4);
            let backward = GluGradient {
                gate: gate_of,
                gate_up: Strided {
                    data: &gate_up.data,
                    stride: 2 * i + 3,
                    n,
                    d: 2 * i,
                },
                d_gate_up: d_gate_up.target(),
            };
            multiply_by(tiles, n > 40, &dy, &down, Columns::Any(i), &backward);
            let mut expected = vec![0.0; 2 * n * i];
            for (at, &d) in d_gated.iter().enumerate() {
                let (g, u, [z, slope]) = (gate(at), up(at), argument(gate(at)));
                let (s, to) = (sigmoid(z), at / i * 2 * i + at % i);
                expected[to] = d * u * s * (1.0 + g * slope * (1.0 - s));
                expected[to + i] = d * g * s;
            }
            close::<T>(&what, &d_gate_up.numbers(), &expected);
        });
    }
}

#[test]
fn the_gated_activation_and_its_gradient_agree_with_fp64() {
    gated::<f32>(Silu, SILU);
    gated::<bf16>(Silu, SILU);
    gated::<f32>(GeluTanh, GELU);
    gated::<bf16>(GeluTanh, GELU);
}

fn rope<T: Dtype + Tiled>() {
    for [n, h, heads, rotated, d] in [
        [1, 8, 3, 2, 16],
        [33, 24, 5, 4, 64],
        [70, 520, 3, 2, 24],
        [9, 10, 4, 3, 10],
        [17, 32, 2, 1, 256],
    ] {
        let x = Operand64::<T>::new("x", false, [n, h], 0);
        let w = Operand64::<T>::new("w", true, [h, heads * d], 0);
        let half = d / 2;
        let angles = uniform("angles", 20 * half);
        let cos: Vec<f32> = angles.iter().map(|a| (3.0 * a).cos()).collect();
        let sin: Vec<f32> = angles.iter().map(|a| (3.0 * a).sin()).collect();
        let positions: Vec<i64> = (0..n as i64).map(|t| t * 7 % 20).collect();
        let mut expected = product64(&x, &w);
        for (t, row) in expected.chunks_exact_mut(heads * d).enumerate() {
            for head in row.chunks_exact_mut(d).take(rotated) {
                for i in 0..half {
                    let at = positions[t] as usize * half + i;
                    let (c, s) = (f64::from(cos[at]), f64::from(sin[at]));
                    let (a, b) = (head[i], head[i + half]);
                    (head[i], head[i + half]) = (a * c - b * s, b * c + a * s);
                }
            }
        }
        for_each_way::<T>(|way, tiles| {
            let mut out = Output::<T>::new(n, heads * d, 6);
            let rope = Rope::new(out.target(), [rotated, d], [&cos, &sin], &positions).unwrap();
            multiply_by(tiles, n > 40, &x, &w, rope.columns(), &rope);
            close::<T>(&format!("{way} heads of {d}"), &out.numbers(), &expected);
        });
    }
}

#[test]
fn heads_are_rotated_and_values_are_not() {
    rope::<f32>();
    rope::<bf16>();
}

#[test]
fn epilogues_refuse_products_that_they_are_not_for() {
    let message = |result: Result<(), Error>| result.unwrap_err().to_string();
    let mut data = vec![0f32; 4 * 12];
    let mut other = vec![0f32; 4 * 6];
    let glu = Glu {
        gate: Silu,
        gate_up: Target::new(&mut data, [4, 12], 12).unwrap(),
        gated: Target::new(&mut other, [4, 6], 6).unwrap(),
    };
    assert!(glu.check(4, Columns::Halves { width: 6 }).is_ok());
    assert!(message(glu.check(4, Columns::Any(12))).contains("halves of 6"));
    assert!(message(glu.check(5, Columns::Halves { width: 6 })).contains("[5, 12]"));

    let read = [0f32; 47];
    let strided = |n, d| Strided {
        data: &read[..],
        stride: d,
        n,
        d,
    };
    let mut gradient = |n, d, columns| {
        let epilogue = GluGradient {
            gate: Silu,
            gate_up: strided(n, d),
            d_gate_up: Target::new(&mut data, [4, 12], 12).unwrap(),
        };
        message(epilogue.check(4, columns))
    };
    assert!(gradient(4, 12, Columns::Any(6)).contains("47 numbers"));
    assert!(gradient(3, 12, Columns::Any(6)).contains("[3, 12]"));
    assert!(gradient(4, 12, Columns::Halves { width: 3 }).contains("may not be"));
    let add = AddResidual {
        residual: strided(4, 11),
        out: Target::new(&mut data, [4, 12], 12).unwrap(),
    };
    assert!(message(add.check(4, Columns::Any(12))).contains("`residual`"));

    let tables = [&read[..8], &read[8..16]];
    let mut rope = |[rotated, d]: [usize; 2], positions: &[i64]| {
        let out = Target::new(&mut data, [4, 12], 12).unwrap();
        Rope::new(out, [rotated, d], tables, positions)
            .map(|rope| rope.columns())
            .map_err(|error| error.to_string())
    };
    let columns = Columns::Groups { count: 3, width: 4 };
    assert_eq!(rope([2, 4], &[0, 3, 2, 1]), Ok(columns));
    assert!(
        rope([2, 4], &[0, 4, 2, 1])
            .unwrap_err()
            .contains("`positions`[1] is 4")
    );
    assert!(rope([2, 4], &[0, -1, 2, 1]).is_err());
    assert!(rope([2, 4], &[0, 1]).is_err());
    assert!(rope([4, 4], &[0; 4]).is_err());
    assert!(rope([1, 5], &[0; 4]).is_err());
}

#[test]
fn epilogues_give_the_same_bits_on_any_number_of_threads() {
    let run = |threads| {
        on_threads(threads, || {
            let [n, h, i] = [150, 700, 90];
            let x = Operand64::<bf16>::new("x", false, [n, h], 0);
            let w = Operand64::<bf16>::new("w", true, [h, 2 * i], 0);
            let mut gate_up = Output::<bf16>::new(n, 2 * i, 0);
            let mut gated = Output::<bf16>::new(n, i, 0);
            let forward = Glu {
                gate: Silu,
                gate_up: gate_up.target(),
                gated: gated.target(),
            };
            multiply_by(false, false, &x, &w, Columns::Halves { width: i }, &forward);
            [gate_up.data, gated.data].concat()
        })
    };
    let one = run(1);
    for threads in [2, 3, 5] {
        assert!(one == run(threads), "{threads}");
    }
}
