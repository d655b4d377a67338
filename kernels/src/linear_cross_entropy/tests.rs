#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
use super::*;
use crate::testing::*;

struct Case {
    x: Tensor,
    w: Tensor,
    targets: Tensor,
    weights: Tensor,
    vocab: usize,
}

impl Case {
    fn new(n: i64, h: i64, v: i64, vocab: i64, kind: Kind) -> Case {
        let targets: Vec<i64> = (0..n)
            .map(|t| if t % 5 == 3 { IGNORE } else { t * 31 % vocab })
            .collect();
        Case {
            x: normal("x", &[n, h], kind),
            w: normal("w", &[v, h], kind),
            targets: numbers(&targets),
            weights: normal("weights", &[n], Kind::Float).abs(),
            vocab: vocab as usize,
        }
    }

    fn inputs(&self, weighted: bool, chunk: usize) -> Inputs<'_> {
        Inputs {
            x: &self.x,
            w: &self.w,
            targets: &self.targets,
            weights: weighted.then_some(&self.weights),
            vocab_size: self.vocab,
            chunk,
        }
    }
}

#[test]
fn agrees_with_fp64_autograd_whoever_multiplies() {
    whoever_multiplies(agrees_with_fp64_autograd);
}

fn agrees_with_fp64_autograd() {
    for (kind, bound) in DTYPES {
        for (n, h, v, vocab, chunk) in [
            (1, 3, 2, 2, 1),
            (23, 16, 101, 101, 7),
            (64, 32, 320, 300, 64),
            (9, 8, 64, 50, 99),
        ] {
            for weighted in [false, true] {
                let case = Case::new(n, h, v, vocab, kind);
                let inputs = case.inputs(weighted, chunk);
                let (x64, w64) = (leaf(&case.x), leaf(&case.w));
                let loss64 = reference(&Inputs {
                    x: &x64,
                    w: &w64,
                    ..inputs
                })
                .unwrap();
                let expected =
                    Tensor::run_backward(&[loss64.shallow_clone()], &[&x64, &w64], false, false);

                let mut workspace = workspace();
                let mut planned = WorkspacePlan::new(device());
                plan(
                    &mut planned,
                    kind,
                    n as usize,
                    [v as usize, h as usize],
                    chunk,
                );
                let mut total = zeros(&[1], Kind::Double);
                let mut per_token = poison(&[n], Kind::Float);
                let mut dx = poison(&[n, h], kind);
                let mut dw = zeros(&[v, h], Kind::Float);
                for times in 1..=2 {
                    let losses = Losses {
                        sum: &mut total,
                        per_token: Some(&mut per_token),
                    };
                    let gradients = Gradients {
                        dx: Some(&mut dx),
                        dw: Some(&mut dw),
                    };
                    forward_backward(&inputs, losses, gradients, &mut workspace).unwrap();
                    assert_close("loss", &total, &(loss64.view([1]) * times), bound);
                    assert_close("dx", &dx, &expected[0], bound);
                    assert_close("dw", &dw, &(&expected[1] * times), bound);
                }
                let padding = dw.narrow(0, vocab, v - vocab).abs().sum(Kind::Float);
                assert_eq!(padding.double_value(&[]), 0.0);
                let sum = per_token.sum(Kind::Double).view([1]) * 2.0;
                assert_close("per token", &sum, &total, 1e-6);

                let mut alone = zeros(&[1], Kind::Double);
                let losses = Losses {
                    sum: &mut alone,
                    per_token: None,
                };
                forward(&inputs, losses, &mut workspace).unwrap();
                assert_eq!(alone.double_value(&[0]) * 2.0, total.double_value(&[0]));
                assert_eq!(workspace.bytes(), planned.bytes() as u64, "{n} × {h} × {v}");
            }
        }
    }
}

#[test]
fn nothing_to_predict_costs_nothing_everywhere() {
    everywhere(nothing_to_predict_costs_and_moves_nothing);
}

fn nothing_to_predict_costs_and_moves_nothing() {
    let mut case = Case::new(6, 8, 20, 20, Kind::Float);
    let _ = case.targets.fill_(IGNORE);
    let mut total = zeros(&[1], Kind::Double);
    let (mut dx, mut dw) = (poison(&[6, 8], Kind::Float), zeros(&[20, 8], Kind::Float));
    let losses = Losses {
        sum: &mut total,
        per_token: None,
    };
    let gradients = Gradients {
        dx: Some(&mut dx),
        dw: Some(&mut dw),
    };
    let mut workspace = workspace();
    forward_backward(&case.inputs(false, 4), losses, gradients, &mut workspace).unwrap();
    for tensor in [&total, &dx, &dw] {
        assert_eq!(tensor.abs().sum(Kind::Double).double_value(&[]), 0.0);
    }
}

#[test]
fn far_apart_logits_stay_finite_everywhere() {
    everywhere(far_apart_logits_stay_finite);
}

fn far_apart_logits_stay_finite() {
    let case = Case::new(16, 8, 50, 50, Kind::Float);
    let (x, w) = (&case.x * 100.0, &case.w * 100.0);
    let mut total = zeros(&[1], Kind::Double);
    let (mut dx, mut dw) = (poison(&[16, 8], Kind::Float), zeros(&[50, 8], Kind::Float));
    let inputs = Inputs {
        x: &x,
        w: &w,
        ..case.inputs(false, 16)
    };
    let losses = Losses {
        sum: &mut total,
        per_token: None,
    };
    let gradients = Gradients {
        dx: Some(&mut dx),
        dw: Some(&mut dw),
    };
    forward_backward(&inputs, losses, gradients, &mut workspace()).unwrap();
    let (x64, w64) = (leaf(&x), leaf(&w));
    let loss = reference(&Inputs {
        x: &x64,
        w: &w64,
        ..inputs
    })
    .unwrap();
    assert_close("loss", &total, &loss.view([1]), 1e-5);
    assert!(dx.isfinite().all().int64_value(&[]) == 1);
}

#[test]
fn gradients_may_be_absent_and_bad_targets_change_nothing() {
    let case = Case::new(10, 8, 20, 15, Kind::Float);
    let mut workspace = workspace();
    let mut total = zeros(&[1], Kind::Double);
    let mut run = |inputs: &Inputs<'_>, dx: Option<&mut Tensor>, dw: Option<&mut Tensor>| {
        let losses = Losses {
            sum: &mut total,
            per_token: None,
        };
        forward_backward(inputs, losses, Gradients { dx, dw }, &mut workspace)
    };
    let (mut dx, mut both) = (poison(&[10, 8], Kind::Float), poison(&[10, 8], Kind::Float));
    let mut dw = zeros(&[20, 8], Kind::Float);
    run(&case.inputs(false, 3), Some(&mut dx), None).unwrap();
    run(&case.inputs(false, 3), Some(&mut both), Some(&mut dw)).unwrap();
    assert_eq!(bits(&dx), bits(&both));

    let before = bits(&dw);
    let targets = case.targets.copy();
    let _ = targets.narrow(0, 9, 1).fill_(15);
    let bad = Inputs {
        targets: &targets,
        ..case.inputs(false, 3)
    };
    let error = run(&bad, Some(&mut dx), Some(&mut dw)).unwrap_err();
    assert!(error.to_string().contains("`targets`[9] is 15"), "{error}");
    assert_eq!(bits(&dw), before);
    let error = run(
        &Inputs {
            vocab_size: 21,
            ..bad
        },
        None,
        None,
    )
    .unwrap_err();
    assert!(error.to_string().contains("vocab_size 21"), "{error}");
    assert!(run(&Inputs { chunk: 0, ..bad }, None, None).is_err());
    let mut narrow = zeros(&[20, 8], Kind::BFloat16);
    assert!(run(&case.inputs(false, 3), None, Some(&mut narrow)).is_err());
    let mut over = case.w.narrow(0, 5, 10);
    let error = run(&case.inputs(false, 3), Some(&mut over), None).unwrap_err();
    assert!(error.to_string().contains("share memory"), "{error}");
}

#[test]
fn same_bits_twice() {
    let expected = on_threads(2, run);
    assert!(on_threads(2, run) == expected);
    assert_order_independent(run);
}

fn run() -> Vec<u32> {
    let case = Case::new(50, 16, 300, 290, Kind::BFloat16);
    let mut total = zeros(&[1], Kind::Double);
    let (mut dx, mut dw) = (
        poison(&[50, 16], Kind::BFloat16),
        zeros(&[300, 16], Kind::Float),
    );
    let losses = Losses {
        sum: &mut total,
        per_token: None,
    };
    let gradients = Gradients {
        dx: Some(&mut dx),
        dw: Some(&mut dw),
    };
    let inputs = case.inputs(true, 16);
    forward_backward(&inputs, losses, gradients, &mut workspace()).unwrap();
    let total = total.double_value(&[0]).to_bits();
    let total = vec![(total >> 32) as u32, total as u32];
    [total, bits(&dx), bits(&dw)].concat()
}

#[test]
fn on_a_gpu_a_bad_target_makes_nan_of_its_own_row() {
    on_gpu(|| {
        let case = Case::new(6, 8, 20, 15, Kind::Float);
        let targets = numbers(&[1i64, 2, 15, 3, -1, IGNORE]);
        let inputs = Inputs {
            targets: &targets,
            ..case.inputs(false, 3)
        };
        let (mut total, mut per_token) = (zeros(&[1], Kind::Double), poison(&[6], Kind::Float));
        let mut dx = zeros(&[6, 8], Kind::Float);
        let losses = Losses {
            sum: &mut total,
            per_token: Some(&mut per_token),
        };
        let gradients = Gradients {
            dx: Some(&mut dx),
            dw: None,
        };
        forward_backward(&inputs, losses, gradients, &mut workspace()).unwrap();
        let nan = |x: &Tensor| {
            bits(x)
                .iter()
                .map(|&bits| f32::from_bits(bits).is_nan())
                .collect()
        };
        let rows: Vec<bool> = nan(&per_token);
        assert_eq!(rows, [false, false, true, false, true, false]);
        let elements: Vec<bool> = nan(&dx);
        assert!(
            elements
                .chunks(8)
                .zip(rows)
                .all(|(row, bad)| row.iter().all(|nan| *nan == bad))
        );
        assert!(total.double_value(&[0]).is_nan());
    });
}
