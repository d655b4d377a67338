#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
use super::*;
use crate::testing::*;
use tch::Device;

/// q, k and v as views into one fused buffer `[batch, seq, nq + 2·nkv, d]`.
fn fused(name: &str, batch: i64, seq: i64, [nq, nkv, d]: [i64; 3], kind: Kind) -> [Tensor; 3] {
    let fused = normal(name, &[batch, seq, nq + 2 * nkv, d], kind);
    [
        fused.narrow(2, 0, nq),
        fused.narrow(2, nq, nkv),
        fused.narrow(2, nq + nkv, nkv),
    ]
}

fn check(documents: &DocumentStarts, heads: [i64; 3], kind: Kind, bound: f64) {
    let (batch, seq) = (documents.batch() as i64, documents.seq() as i64);
    let [nq, _, d] = heads;
    let [q, k, v] = fused("qkv", batch, seq, heads, kind);
    let on_cpu = device() == Device::Cpu;
    let starts = (!on_cpu).then(|| numbers(&documents.cumulative()));
    let inputs = Inputs {
        q: &q,
        k: &k,
        v: &v,
        documents,
        starts: starts.as_ref(),
        scale: (d as f64).powf(-0.5),
    };
    let mut out = poison(&[batch, seq, nq, d], kind);
    let mut lse = poison(&[batch, nq, seq], Kind::Float);
    let mut workspace = workspace();
    forward(&inputs, &mut out, &mut lse, &mut workspace).unwrap();

    let (q64, k64, v64) = (leaf(&q), leaf(&k), leaf(&v));
    let expected = reference(&Inputs {
        q: &q64,
        k: &k64,
        v: &v64,
        ..inputs
    })
    .unwrap();
    assert_close("out", &out, &expected, bound);
    let dout = normal("dout", &[batch, seq, nq, d], kind);
    let expected = gradients(&expected, &dout, &[&q64, &k64, &v64]);
    let [mut dq, mut dk, mut dv] = fused("d", batch, seq, heads, kind);
    let gradients = Gradients {
        dq: &mut dq,
        dk: &mut dk,
        dv: &mut dv,
    };
    backward(&inputs, &out, &lse, &dout, gradients, &mut workspace).unwrap();
    let heads = heads.map(|count| count as usize);
    let mut planned = WorkspacePlan::new(device());
    plan(
        &mut planned,
        kind,
        documents.batch() * documents.seq(),
        heads,
    )
    .unwrap();
    assert_eq!(workspace.bytes(), planned.bytes() as u64);
    // A single token attends to itself alone: its dq and dk are zero.
    if documents.attention_pairs() > (batch * seq) as u64 {
        assert_close("dq", &dq, &expected[0], bound);
        assert_close("dk", &dk, &expected[1], bound);
    }
    assert_close("dv", &dv, &expected[2], bound);
}

#[test]
fn agrees_with_fp64_autograd_on_packed_documents() {
    here(|| {
        let packed = DocumentStarts::new(37, &[vec![0, 1, 2, 20], vec![0, 36], vec![0]]).unwrap();
        let whole = DocumentStarts::whole(2, 70);
        let single = DocumentStarts::whole(3, 1);
        for (kind, bound) in DTYPES {
            for documents in [&packed, &whole, &single] {
                for heads in [[8, 2, 16], [3, 3, 64], [4, 1, 10]] {
                    check(documents, heads, kind, bound);
                }
            }
        }
    });
}

/// Sizes of real models, between which a GPU's kernels are chosen.
#[test]
fn agrees_with_fp64_autograd_at_the_heads_of_models() {
    here(|| {
        let packed = DocumentStarts::new(200, &[[0, 77, 78]]).unwrap();
        let whole = DocumentStarts::whole(1, 130);
        for documents in [&packed, &whole] {
            for heads in [[4, 2, 128], [2, 1, 256], [2, 2, 80]] {
                check(documents, heads, Kind::BFloat16, 1e-2);
            }
        }
    });
}

#[test]
fn a_document_does_not_see_its_neighbours() {
    let heads = [8, 2, 16];
    let [q, k, v] = fused("qkv", 1, 50, heads, Kind::Float);
    let run = |q: &Tensor, k: &Tensor, v: &Tensor, documents: &DocumentStarts| {
        let seq = documents.seq() as i64;
        let mut out = poison(&[1, seq, 8, 16], Kind::Float);
        let mut lse = poison(&[1, 8, seq], Kind::Float);
        forward(
            &Inputs {
                q,
                k,
                v,
                documents,
                starts: None,
                scale: 0.25,
            },
            &mut out,
            &mut lse,
            &mut Workspace::new(Device::Cpu),
        )
        .unwrap();
        out
    };
    let packed = run(
        &q,
        &k,
        &v,
        &DocumentStarts::new(50, &[[0, 13, 40]]).unwrap(),
    );
    let part = |x: &Tensor| x.narrow(1, 13, 27);
    let alone = run(
        &part(&q),
        &part(&k),
        &part(&v),
        &DocumentStarts::whole(1, 27),
    );
    assert_eq!(bits(&part(&packed)), bits(&alone));
}

#[test]
fn same_bits_on_any_number_of_threads() {
    assert_thread_independent(|| {
        let [q, k, v] = fused("qkv", 1, 150, [8, 2, 16], Kind::BFloat16);
        let documents = DocumentStarts::new(150, &[[0, 100]]).unwrap();
        let inputs = Inputs {
            q: &q,
            k: &k,
            v: &v,
            documents: &documents,
            starts: None,
            scale: 0.25,
        };
        let mut out = poison(&[1, 150, 8, 16], Kind::BFloat16);
        let mut lse = poison(&[1, 8, 150], Kind::Float);
        let mut workspace = Workspace::new(Device::Cpu);
        forward(&inputs, &mut out, &mut lse, &mut workspace).unwrap();
        let [mut dq, mut dk, mut dv] = fused("d", 1, 150, [8, 2, 16], Kind::BFloat16);
        let gradients = Gradients {
            dq: &mut dq,
            dk: &mut dk,
            dv: &mut dv,
        };
        backward(&inputs, &out, &lse, &out, gradients, &mut workspace).unwrap();
        [bits(&out), bits(&lse), bits(&dq), bits(&dk), bits(&dv)].concat()
    });
}

#[test]
fn bad_arguments_are_refused() {
    let [q, k, v] = fused("qkv", 1, 8, [6, 2, 4], Kind::Float);
    let mut out = zeros(&[1, 8, 6, 4], Kind::Float);
    let mut lse = zeros(&[1, 6, 8], Kind::Float);
    let documents = DocumentStarts::whole(1, 8);
    let inputs = Inputs {
        q: &q,
        k: &k,
        v: &v,
        documents: &documents,
        starts: None,
        scale: 0.5,
    };
    forward(
        &inputs,
        &mut out,
        &mut lse,
        &mut Workspace::new(Device::Cpu),
    )
    .unwrap();
    let other = DocumentStarts::whole(1, 9);
    let error = forward(
        &Inputs {
            documents: &other,
            ..inputs
        },
        &mut out,
        &mut lse,
        &mut Workspace::new(Device::Cpu),
    );
    assert!(
        error
            .unwrap_err()
            .to_string()
            .contains("[1, 9] tokens, but `q` holds [1, 8]")
    );
    let wide = q.narrow(2, 0, 5);
    assert!(
        forward(
            &Inputs { q: &wide, ..inputs },
            &mut zeros(&[1, 8, 5, 4], Kind::Float),
            &mut zeros(&[1, 5, 8], Kind::Float),
            &mut Workspace::new(Device::Cpu)
        )
        .unwrap_err()
        .to_string()
        .contains("5 query heads cannot share 2")
    );
    let mut half = lse.to_kind(Kind::BFloat16);
    assert!(
        forward(
            &inputs,
            &mut out,
            &mut half,
            &mut Workspace::new(Device::Cpu)
        )
        .is_err()
    );
    let mut transposed = zeros(&[1, 8, 4, 6], Kind::Float).transpose(2, 3);
    assert!(
        forward(
            &inputs,
            &mut transposed,
            &mut lse,
            &mut Workspace::new(Device::Cpu)
        )
        .is_err()
    );
}
