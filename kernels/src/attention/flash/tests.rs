#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
use half::bf16;

use super::*;
use crate::Threads;
use crate::simd::{Level, level, with_level};
use crate::testing::uniform;

/// Everything of one call, in T.
struct Case<T> {
    documents: DocumentStarts,
    heads: [usize; 3],
    scale: f32,
    /// q, k and v side by side, `[batch, seq, nq + 2·nkv, d]`.
    qkv: Vec<T>,
    dout: Vec<T>,
}

/// What came out; the gradients side by side, as the inputs.
#[derive(Clone, PartialEq, Debug)]
struct Results<N> {
    out: Vec<N>,
    lse: Vec<N>,
    gradients: Vec<N>,
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

/// One pass of a case.
enum Call<'a, 'v, T> {
    Forward(
        &'a Inputs<'a, T>,
        &'a mut HeadsMut<'v, T>,
        &'a mut [f32],
        &'a mut [f32],
    ),
    Backward(
        backward::Arguments<'a, T>,
        &'a mut Gradients<'v, T>,
        &'a mut [f32],
    ),
}

impl<T: Dtype> Case<T> {
    fn new(documents: DocumentStarts, heads: [usize; 3], size: f32) -> Case<T> {
        let tokens = documents.batch() * documents.seq();
        let [nq, nkv, d] = heads;
        let numbers = |name: &str, n: usize, size: f32| -> Vec<T> {
            uniform(name, n)
                .iter()
                .map(|x| T::from_f32(x * size))
                .collect()
        };
        Case {
            documents,
            heads,
            scale: (d as f32).powf(-0.5),
            qkv: numbers("qkv", tokens * (nq + 2 * nkv) * d, size),
            dout: numbers("dout", tokens * nq * d, 1.0),
        }
    }

    /// Shape and strides of the fused views, and where each begins.
    fn views(&self) -> ([[usize; 4]; 3], [usize; 3], [usize; 3]) {
        let [nq, nkv, d] = self.heads;
        let (batch, seq) = (self.documents.batch(), self.documents.seq());
        let row = (nq + 2 * nkv) * d;
        let shapes = [nq, nkv, nkv].map(|heads| [batch, seq, heads, d]);
        (shapes, [seq * row, row, d], [0, nq * d, (nq + nkv) * d])
    }

    fn tokens(&self) -> usize {
        self.documents.batch() * self.documents.seq()
    }

    fn run(&self) -> Results<f32> {
        let len = scratch_len::<T>(self.tokens(), self.heads, Passes::Both).unwrap();
        self.run_in(&mut vec![f32::NAN; len])
    }

    fn run_in(&self, scratch: &mut [f32]) -> Results<f32> {
        self.run_by(scratch, |call| match call {
            Call::Forward(inputs, out, lse, scratch) => forward(inputs, out, lse, scratch),
            Call::Backward(arguments, gradients, scratch) => {
                let backward::Arguments {
                    inputs,
                    out,
                    lse,
                    dout,
                } = arguments;
                backward(inputs, out, lse, dout, gradients, scratch)
            }
        })
    }

    /// With a kernel that no level has.
    fn run_with<K: Kernel>(&self, kernel: K) -> Results<f32>
    where
        T: Operand<K::Element>,
    {
        self.run_by(&mut vec![f32::NAN; 1 << 22], |call| match call {
            Call::Forward(inputs, out, lse, scratch) => {
                let shape = inputs.check(FORWARD)?;
                forward::run(kernel, shape, inputs, out, lse, scratch)
            }
            Call::Backward(arguments, gradients, scratch) => {
                let shape = arguments.inputs.check(BACKWARD)?;
                backward::run(kernel, shape, arguments, gradients, scratch)
            }
        })
    }

    fn run_by(
        &self,
        scratch: &mut [f32],
        call: impl Fn(Call<'_, '_, T>) -> Result<(), Error>,
    ) -> Results<f32> {
        let (shapes, strides, at) = self.views();
        let view = |i: usize| {
            let data = self.qkv.get(at[i]..).unwrap_or(&[]);
            Heads::new(data, shapes[i], strides).unwrap()
        };
        let inputs = Inputs {
            q: view(0),
            k: view(1),
            v: view(2),
            documents: &self.documents,
            scale: self.scale,
        };
        let [batch, seq, nq, d] = shapes[0];
        let mut out = vec![T::from_f32(f32::NAN); batch * seq * nq * d];
        let mut lse = vec![f32::NAN; batch * seq * nq];
        let mut out_view = HeadsMut::dense(&mut out, shapes[0]).unwrap();
        call(Call::Forward(&inputs, &mut out_view, &mut lse, scratch)).unwrap();
        let mut all = vec![T::from_f32(f32::NAN); self.qkv.len()];
        let start = all.as_mut_ptr();
        // SAFETY: three disjoint sets of heads of one buffer that outlives them.
        let [dq, dk, dv] = [0, 1, 2].map(|i| unsafe {
            HeadsMut::from_raw(start.wrapping_add(at[i]), shapes[i], strides).unwrap()
        });
        let arguments = backward::Arguments {
            inputs: &inputs,
            out: &Heads::dense(&out, shapes[0]).unwrap(),
            lse: &lse,
            dout: &Heads::dense(&self.dout, shapes[0]).unwrap(),
        };
        call(Call::Backward(
            arguments,
            &mut Gradients { dq, dk, dv },
            scratch,
        ))
        .unwrap();
        let widen = |x: &[T]| x.iter().map(|x| x.to_f32()).collect();
        Results {
            out: widen(&out),
            lse,
            gradients: widen(&all),
        }
    }

    /// The same in fp64, pair by pair.
    fn reference(&self) -> Results<f64> {
        let (shapes, strides, at) = self.views();
        let [batch, seq, nq, d] = shapes[0];
        let nkv = shapes[1][2];
        let widen = |x: &[T]| -> Vec<f64> { x.iter().map(|x| f64::from(x.to_f32())).collect() };
        let (x, dout) = (widen(&self.qkv), widen(&self.dout));
        let mut results = Results {
            out: vec![0.0; batch * seq * nq * d],
            lse: vec![0.0; batch * seq * nq],
            gradients: vec![0.0; x.len()],
        };
        let scale = f64::from(self.scale);
        for (b, tokens) in self.documents.documents() {
            for head in 0..nq {
                let kv = head / (nq / nkv);
                let place = |of: usize, t: usize, head: usize| {
                    at[of] + b * strides[0] + t * strides[1] + head * strides[2]
                };
                for t in tokens.clone() {
                    let q = &x[place(0, t, head)..][..d];
                    let keys = tokens.start..t + 1;
                    let dot =
                        |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
                    let scores: Vec<f64> = keys
                        .clone()
                        .map(|j| scale * dot(q, &x[place(1, j, kv)..][..d]))
                        .collect();
                    let most = scores.iter().copied().fold(f64::MIN, f64::max);
                    let sum: f64 = scores.iter().map(|s| (s - most).exp()).sum();
                    let o = ((b * seq + t) * nq + head) * d;
                    results.lse[(b * nq + head) * seq + t] = most + sum.ln();
                    let weight = |s: f64| (s - most).exp() / sum;
                    for (j, s) in keys.clone().zip(&scores) {
                        for c in 0..d {
                            results.out[o + c] += weight(*s) * x[place(2, j, kv) + c];
                        }
                    }
                    let dout = &dout[o..][..d];
                    let delta = dot(dout, &results.out[o..][..d]);
                    for (j, s) in keys.zip(&scores) {
                        let p = weight(*s);
                        let v = place(2, j, kv);
                        let ds = scale * p * (dot(dout, &x[v..][..d]) - delta);
                        for c in 0..d {
                            results.gradients[v + c] += p * dout[c];
                            results.gradients[place(1, j, kv) + c] += ds * q[c];
                            results.gradients[place(0, t, head) + c] += ds * x[place(1, j, kv) + c];
                        }
                    }
                }
            }
        }
        results
    }

    /// Splits fused gradients into dq, dk and dv.
    fn split<N: Copy + Into<f64>>(&self, fused: &[N]) -> [Vec<f64>; 3] {
        let (shapes, _, at) = self.views();
        let [nq, nkv, d] = self.heads;
        [0, 1, 2].map(|i| {
            fused
                .chunks_exact((nq + 2 * nkv) * d)
                .flat_map(|row| &row[at[i]..at[i] + shapes[i][2] * d])
                .map(|&x| x.into())
                .collect()
        })
    }

    /// At every level of this processor.
    fn check(&self, bound: f64) {
        let expected = self.reference();
        for level in levels() {
            with_level(level, || self.compare(&expected, &self.run(), bound));
        }
    }

    fn compare(&self, expected: &Results<f64>, found: &Results<f32>, bound: f64) {
        let what = || {
            let documents = self.documents.documents();
            format!(
                "{:?} heads {:?} documents {documents:?}",
                level(),
                self.heads
            )
        };
        let wide = |x: &[f32]| x.iter().map(|&x| f64::from(x)).collect::<Vec<_>>();
        let close = |name: &str, found: &[f64], expected: &[f64], bound: f64| {
            assert!(
                found.iter().all(|x| x.is_finite()),
                "{name} is not finite: {}",
                what()
            );
            let error = error(found, expected);
            assert!(error <= bound, "{name} is off by {error:e}: {}", what());
        };
        close("out", &wide(&found.out), &expected.out, bound);
        close("lse", &wide(&found.lse), &expected.lse, bound);
        let (found, expected) = (
            self.split(&found.gradients),
            self.split(&expected.gradients),
        );
        let pairs = self.documents.attention_pairs() as usize;
        let alone = pairs == self.documents.batch() * self.documents.seq();
        for (i, name) in ["dq", "dk", "dv"].into_iter().enumerate() {
            // A token that attends to itself alone: dq and dk are zero but for rounding.
            if alone && i < 2 {
                assert!(found[i].iter().all(|x| x.abs() < 0.1), "{name}: {}", what());
            } else {
                close(name, &found[i], &expected[i], bound);
            }
        }
    }
}

fn levels() -> impl Iterator<Item = Level> {
    let best = level();
    Level::ALL.into_iter().filter(move |&level| level <= best)
}

fn check(documents: &DocumentStarts, heads: [usize; 3]) {
    Case::<f32>::new(documents.clone(), heads, 2.0).check(1e-5);
    Case::<bf16>::new(documents.clone(), heads, 2.0).check(1e-2);
}

#[test]
fn agrees_with_fp64_on_packed_documents() {
    let packed = DocumentStarts::new(37, &[vec![0, 1, 2, 20], vec![0, 36], vec![0]]).unwrap();
    let singles: Vec<u32> = (0..19).collect();
    let singles = DocumentStarts::new(19, &[singles]).unwrap();
    for documents in [&packed, &singles, &DocumentStarts::whole(3, 1)] {
        for heads in [[8, 2, 16], [3, 3, 64], [4, 1, 10], [1, 1, 33], [2, 1, 1]] {
            check(documents, heads);
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[test]
fn agrees_with_fp64_on_emulated_tiles() {
    use crate::microkernel::amx::{Tiles, emulated::Emulated};
    let documents = DocumentStarts::new(150, &[vec![0, 1, 50], vec![0, 20]]).unwrap();
    for heads in [[4, 2, 64], [2, 1, 10], [1, 1, 80]] {
        let case = Case::<bf16>::new(documents.clone(), heads, 2.0);
        case.compare(&case.reference(), &case.run_with(Tiles(Emulated)), 1e-2);
    }
}

#[test]
fn agrees_with_fp64_at_every_head_dimension() {
    for d in [
        1, 2, 3, 10, 15, 16, 17, 31, 32, 33, 64, 80, 96, 128, 200, 255, 256,
    ] {
        check(&DocumentStarts::whole(1, 45), [2, 1, d]);
    }
}

#[test]
fn agrees_with_fp64_at_every_length() {
    for seq in (1..70).chain([95, 96, 97, 127, 128, 129, 191, 200, 255, 256, 257, 300]) {
        check(&DocumentStarts::whole(1, seq), [1, 1, 8]);
    }
}

#[test]
fn agrees_with_fp64_over_many_blocks() {
    let ragged = DocumentStarts::new(700, &[vec![0, 3, 4, 300], vec![0, 650]]).unwrap();
    let whole = DocumentStarts::whole(1, 1111);
    check(&ragged, [8, 2, 16]);
    check(&whole, [1, 1, 64]);
    check(&whole, [3, 3, 10]);
    check(&DocumentStarts::whole(2, 333), [4, 1, 128]);
    check(&DocumentStarts::whole(1, 333), [4, 2, 256]);
}

#[test]
fn extreme_logits_stay_finite() {
    // Uniform in ±1: a score has variance size⁴ · d / 9 before the scale.
    for level in levels() {
        with_level(level, || {
            let documents = DocumentStarts::new(150, &[[0, 100]]).unwrap();
            for size in [30.0, 100.0, 200.0] {
                let case = Case::<f32>::new(documents.clone(), [4, 2, 64], size);
                let (found, expected) = (case.run(), case.reference());
                let all = [&found.out, &found.lse, &found.gradients];
                assert!(all.iter().all(|x| x.iter().all(|x| x.is_finite())));
                let top = expected.lse.iter().copied().fold(0.0, f64::max);
                assert!(size < 200.0 || top > 1e4, "{top}");
                let wide = |x: &[f32]| x.iter().map(|&x| f64::from(x)).collect::<Vec<_>>();
                // A score of 10⁴ is known to 10⁻³ in fp32, and so are the probabilities.
                assert!(error(&wide(&found.out), &expected.out) < 1e-3);
                assert!(error(&wide(&found.lse), &expected.lse) < 1e-6);
                let case = Case::<bf16>::new(documents.clone(), [4, 2, 64], size);
                let found = case.run();
                let all = [&found.out, &found.lse, &found.gradients];
                assert!(all.iter().all(|x| x.iter().all(|x| x.is_finite())));
            }
        });
    }
}

#[test]
fn one_logit_above_all_and_one_below_all() {
    // Query and key vectors along one axis: scores are exactly ±10⁴ or 0.
    for level in levels() {
        with_level(level, || {
            let mut case = Case::<f32>::new(DocumentStarts::whole(1, 130), [1, 1, 16], 1.0);
            case.scale = 1.0;
            for (t, row) in case.qkv.chunks_exact_mut(3 * 16).enumerate() {
                row[..32].fill(0.0);
                row[0] = 100.0;
                row[16] = [0.0, 100.0, -100.0][t % 3];
            }
            // All keys with weight point the same way, so dq and dk are zero but for rounding.
            let (found, expected) = (case.run(), case.reference());
            let wide = |x: &[f32]| x.iter().map(|&x| f64::from(x)).collect::<Vec<_>>();
            assert!(error(&wide(&found.out), &expected.out) < 1e-5);
            assert!(error(&wide(&found.lse), &expected.lse) < 1e-6);
            let [dq, dk, dv] = case.split(&found.gradients);
            // The log-sum-exp of 10⁴ is stored with an error of 5·10⁻⁴, and the backward pass has
            // nothing better to compute probabilities from.
            assert!(error(&dv, &case.split(&expected.gradients)[2]) < 1e-3);
            assert!(dq.iter().chain(&dk).all(|x| x.is_finite()));
        });
    }
}

#[test]
fn denormal_inputs_are_harmless() {
    for level in levels() {
        with_level(level, || {
            let case = Case::<f32>::new(DocumentStarts::whole(1, 70), [2, 1, 16], 1e-41);
            let found = case.run();
            let all = [&found.out, &found.lse, &found.gradients];
            assert!(all.iter().all(|x| x.iter().all(|x| x.is_finite())));
            // All scores are zero: the mean of so many values.
            for t in 0..70 {
                assert!((found.lse[t] - (t as f32 + 1.0).ln()).abs() < 1e-5);
            }
            Case::<bf16>::new(DocumentStarts::whole(1, 70), [2, 1, 16], 1e-40).run();
        });
    }
}

#[test]
fn a_document_does_not_see_its_neighbours() {
    let heads = [8, 2, 16];
    let row = (8 + 4) * 16;
    let packed = Case::<f32>::new(DocumentStarts::new(50, &[[0, 13, 40]]).unwrap(), heads, 1.0);
    let mut alone = Case::<f32>::new(DocumentStarts::whole(1, 27), heads, 1.0);
    alone.qkv = packed.qkv[13 * row..40 * row].to_vec();
    alone.dout = packed.dout[13 * 128..40 * 128].to_vec();
    let (packed, alone) = (packed.run(), alone.run());
    assert_eq!(packed.out[13 * 128..40 * 128], alone.out);
    assert_eq!(packed.gradients[13 * row..40 * row], alone.gradients);
}

#[test]
fn same_bits_on_any_number_of_threads() {
    fn check<T: Dtype>(documents: DocumentStarts, heads: [usize; 3]) {
        let case = Case::<T>::new(documents, heads, 2.0);
        let mut runs = [1, 2, 3, 2, 7].map(|threads| {
            Threads::set(threads).unwrap();
            case.run()
        });
        let first = runs[0].clone();
        assert!(runs.iter_mut().all(|run| *run == first));
    }
    for level in levels() {
        with_level(level, || {
            let documents = DocumentStarts::new(900, &[[0, 100, 101]]).unwrap();
            check::<f32>(documents.clone(), [4, 2, 16]);
            check::<bf16>(documents, [4, 2, 16]);
            check::<bf16>(DocumentStarts::whole(1, 1500), [1, 1, 16]);
        });
    }
}

#[test]
fn scratch_is_predicted_exactly() {
    for level in levels() {
        with_level(level, || {
            for threads in [1, 2, 5] {
                Threads::set(threads).unwrap();
                let documents = DocumentStarts::new(300, &[[0, 1], [0, 290]]).unwrap();
                let case = Case::<bf16>::new(documents.clone(), [4, 2, 40], 1.0);
                let len = scratch_len::<bf16>(600, case.heads, Passes::Both).unwrap();
                // Whatever the buffer's place in its cache line, nothing behind it is touched.
                for skip in 0..17 {
                    let mut buffer = vec![7.25f32; skip + len + 64];
                    case.run_in(&mut buffer[skip..skip + len]);
                    let [before, behind] = [&buffer[..skip], &buffer[skip + len..]];
                    assert!(before.iter().chain(behind).all(|&x| x == 7.25));
                }
                let (shapes, strides, at) = case.views();
                let view = |i: usize| Heads::new(&case.qkv[at[i]..], shapes[i], strides).unwrap();
                let inputs = Inputs {
                    q: view(0),
                    k: view(1),
                    v: view(2),
                    documents: &documents,
                    scale: 1.0,
                };
                let len = scratch_len::<bf16>(600, case.heads, Passes::Forward).unwrap();
                let (mut out, mut lse) = (vec![bf16::ZERO; 600 * 160], vec![0.0; 600 * 4]);
                let mut out = HeadsMut::dense(&mut out, shapes[0]).unwrap();
                forward(&inputs, &mut out, &mut lse, &mut vec![0.0; len]).unwrap();
                let short = forward(&inputs, &mut out, &mut lse, &mut vec![0.0; len - 1]);
                let message = short.unwrap_err().to_string();
                assert!(
                    message.contains(&format!("must hold {len} numbers")),
                    "{message}"
                );
            }
        });
    }
}

#[test]
fn nothing_is_done_for_no_tokens() {
    for documents in [DocumentStarts::whole(2, 0), DocumentStarts::whole(0, 5)] {
        let found = Case::<f32>::new(documents, [2, 1, 8], 1.0).run();
        assert!(found.out.is_empty() && found.lse.is_empty() && found.gradients.is_empty());
    }
}

#[test]
fn bad_arguments_are_refused() {
    let documents = DocumentStarts::whole(1, 8);
    let numbers = vec![0f32; 8 * 10 * 4];
    let view = |heads: usize| Heads::dense(&numbers, [1, 8, heads, 4]).unwrap();
    let mut inputs = Inputs {
        q: view(6),
        k: view(2),
        v: view(2),
        documents: &documents,
        scale: 0.5,
    };
    let mut out = vec![0f32; 8 * 6 * 4];
    let mut out = HeadsMut::dense(&mut out, [1, 8, 6, 4]).unwrap();
    let (mut lse, mut scratch) = (vec![0f32; 48], vec![0f32; 1 << 20]);
    let mut run = |inputs: &Inputs<'_, f32>| {
        forward(inputs, &mut out, &mut lse, &mut scratch).map_err(|error| error.to_string())
    };
    run(&inputs).unwrap();
    let other = DocumentStarts::whole(1, 9);
    inputs.documents = &other;
    assert!(
        run(&inputs)
            .unwrap_err()
            .contains("[1, 9] tokens, but `q` holds [1, 8]")
    );
    inputs.documents = &documents;
    inputs.q = view(5);
    assert!(
        run(&inputs)
            .unwrap_err()
            .contains("5 query heads cannot share 2")
    );
    inputs.q = view(6);
    inputs.v = view(3);
    assert!(
        run(&inputs)
            .unwrap_err()
            .contains("`v` must have shape [1, 8, 2, 4]")
    );
    inputs.v = view(2);
    inputs.scale = 0.0;
    assert!(run(&inputs).unwrap_err().contains("must be positive"));
    let short = Heads::new(&numbers, [1, 8, 6, 4], [0, 48, 4])
        .unwrap_err()
        .to_string();
    assert!(short.contains("needs 360 elements, found 320"), "{short}");
    let mut buffer = vec![0f32; 100];
    let overlap = HeadsMut::new(&mut buffer, [1, 2, 2, 4], [0, 6, 4]).unwrap_err();
    assert!(overlap.to_string().contains("heads overlap"));
}
