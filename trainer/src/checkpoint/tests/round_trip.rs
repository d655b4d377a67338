//! What was written is read, whoever wrote which part and whoever reads which.

use std::fs;

use proptest::prelude::*;

use super::*;

/// A piece with its values: tensor, state, range, data.
type Owned = (usize, StateKind, std::ops::Range<usize>, Vec<f32>);

/// A model of up to 4 tensors, cut into pieces at any elements, dealt to up to 5 writers.
#[derive(Clone, Debug)]
struct Scenario {
    shapes: Vec<Vec<usize>>,
    cuts: Vec<usize>,
    owners: Vec<usize>,
    writers: usize,
    reads: Vec<(usize, usize, usize, usize)>,
}

fn scenario() -> impl Strategy<Value = Scenario> {
    (
        proptest::collection::vec(proptest::collection::vec(1usize..9, 0..4), 1..5),
        proptest::collection::vec(0usize..600, 0..8),
        proptest::collection::vec(0usize..5, 16),
        1usize..6,
        proptest::collection::vec((0usize..4, 0usize..3, 0usize..600, 0usize..600), 24),
    )
        .prop_map(|(shapes, cuts, owners, writers, reads)| Scenario {
            shapes,
            cuts,
            owners,
            writers,
            reads,
        })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    #[test]
    fn any_split_and_any_read(scenario in scenario()) {
        let root = tempfile::tempdir().unwrap();
        let dir = root.path().join("step-00000001");
        let counts: Vec<usize> =
            scenario.shapes.iter().map(|shape| shape.iter().product()).collect();
        let names: Vec<String> = (0..counts.len()).map(|tensor| format!("t{tensor}")).collect();
        let mut pieces: Vec<Vec<Owned>> =
            vec![Vec::new(); scenario.writers];
        let mut dealt = 0;
        for (tensor, count) in counts.iter().enumerate() {
            for state in STATES {
                let mut edges: Vec<usize> = scenario.cuts.iter().map(|cut| cut % count).collect();
                edges.extend([0, *count]);
                edges.sort_unstable();
                for edge in edges.windows(2) {
                    let range = edge[0]..edge[1];
                    let data = range.clone().map(|index| value(tensor, state, index)).collect();
                    let owner = scenario.owners[dealt % 16] % scenario.writers;
                    pieces[owner].push((tensor, state, range, data));
                    dealt += 1;
                }
            }
        }
        for (rank, pieces) in pieces.iter().enumerate() {
            let pieces: Vec<PieceData<'_>> = pieces
                .iter()
                .map(|(tensor, state, range, data)| PieceData {
                    tensor: &names[*tensor],
                    state: *state,
                    shape: &scenario.shapes[*tensor],
                    range: range.clone(),
                    data,
                })
                .collect();
            save_part(&dir, rank, scenario.writers, "1-1", &pieces).unwrap();
        }
        commit(&dir, scenario.writers, "1-1", &meta(1), &[], NO_WAIT).unwrap();

        let checkpoint = Checkpoint::open(&dir).unwrap();
        prop_assert_eq!(checkpoint.meta(), &meta(1));
        let expected = names.iter().map(String::as_str);
        let expected = expected.zip(scenario.shapes.iter().map(Vec::as_slice));
        checkpoint.check_model(expected, &STATES).unwrap();
        for (tensor, state, a, b) in &scenario.reads {
            let (tensor, state) = (tensor % counts.len(), STATES[*state]);
            let (a, b) = (a % (counts[tensor] + 1), b % (counts[tensor] + 1));
            let range = a.min(b)..a.max(b);
            let mut out = vec![f32::NAN; range.len()];
            checkpoint.read(&names[tensor], state, range.clone(), &mut out).unwrap();
            prop_assert_eq!(out, &values(tensor, state, counts[tensor])[range]);
        }
    }

    /// Boxes that cut columns, and row-major ranges inside them.
    #[test]
    fn strided_boxes(
        rows in 1usize..7, left in 1usize..5, right in 1usize..5, depth in 1usize..3,
        cut in 0usize..60, a in 0usize..200, b in 0usize..200,
    ) {
        let root = tempfile::tempdir().unwrap();
        let shape = vec![rows, left + right, depth];
        let count = rows * (left + right) * depth;
        let whole = values(0, StateKind::Master, count);
        let cut = cut % (rows * right * depth + 1);
        let regions = [
            (vec![0, 0, 0], vec![rows, left, depth], [0, rows * left * depth]),
            (vec![0, left, 0], vec![rows, right, depth], [0, cut]),
            (vec![0, left, 0], vec![rows, right, depth], [cut, rows * right * depth]),
        ];
        for (rank, (start, extent, range)) in regions.into_iter().enumerate() {
            let region = Region { start, extent, range };
            let data: Vec<f32> = (range[0]..range[1])
                .map(|index| whole[region.tensor_index(&shape, index)])
                .collect();
            let spec = PieceSpec {
                tensor: "w".to_owned(),
                state: StateKind::Master,
                shape: shape.clone(),
                region,
            };
            let mut writer = PartWriter::create(root.path(), rank, 3, "s", [spec]).unwrap();
            for part in data.chunks(7) {
                writer.write(part).unwrap();
            }
            writer.finish().unwrap();
        }
        commit(root.path(), 3, "s", &meta(0), &[], NO_WAIT).unwrap();
        let checkpoint = Checkpoint::open(root.path()).unwrap();
        let (a, b) = (a % (count + 1), b % (count + 1));
        let range = a.min(b)..a.max(b);
        let mut out = vec![f32::NAN; range.len()];
        checkpoint.read("w", StateKind::Master, range.clone(), &mut out).unwrap();
        prop_assert_eq!(out, &whole[range]);
    }
}

/// A tensor over several chunks: reads across chunk edges, and only the chunks needed are read.
#[test]
fn reads_cross_chunks_and_touch_no_others() {
    let root = tempfile::tempdir().unwrap();
    let count = 3 * (4 << 20) / 4 + 1000;
    let data = values(3, StateKind::Master, count);
    let shape = [count];
    let piece = PieceData {
        tensor: "big",
        state: StateKind::Master,
        shape: &shape,
        range: 0..count,
        data: &data,
    };
    let part = save_part(root.path(), 0, 1, "s", &[piece]).unwrap();
    commit(root.path(), 1, "s", &meta(0), &[], NO_WAIT).unwrap();
    let checkpoint = Checkpoint::open(root.path()).unwrap();
    assert_eq!(checkpoint.files()[0].chunks.len(), 4);
    for range in [
        0..count,
        1_000_000..1_100_000,
        count - 1..count,
        5..5,
        1_048_000..2_200_000,
    ] {
        let mut out = vec![0.0; range.len()];
        checkpoint
            .read("big", StateKind::Master, range.clone(), &mut out)
            .unwrap();
        assert_eq!(out, data[range]);
    }

    // Damage in the second chunk is found by a read that needs it and by no other.
    let mut bytes = fs::read(&part.path).unwrap();
    bytes[(4 << 20) + 12345] ^= 4;
    fs::write(&part.path, bytes).unwrap();
    let checkpoint = Checkpoint::open(root.path()).unwrap();
    let mut out = vec![0.0; 10];
    checkpoint
        .read("big", StateKind::Master, 0..10, &mut out)
        .unwrap();
    let at = 3 << 20;
    checkpoint
        .read("big", StateKind::Master, at..at + 10, &mut out)
        .unwrap();
    let error = checkpoint.read("big", StateKind::Master, 1_200_000..1_200_010, &mut out);
    let error = error.unwrap_err();
    assert!(
        matches!(
            error,
            Error::Chunk {
                start: 4194304,
                end: 8388608,
                ..
            }
        ),
        "{error}"
    );
}

/// The payload is a safetensors file to any other reader.
#[test]
fn payload_files_are_safetensors() {
    let root = tempfile::tempdir().unwrap();
    let dir = save_small(root.path(), 1);
    let bytes = fs::read(dir.join("part-00001.1-1.safetensors")).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    assert_eq!(file.len(), 3);
    let view = file.tensor("exp_avg:w[13..=29]").unwrap();
    assert_eq!(view.shape(), [17]);
    assert_eq!(
        view.data(),
        bytemuck::cast_slice::<f32, u8>(&values(0, StateKind::ExpAvg, 30)[13..])
    );
}

/// Attachments come back, byte for byte.
#[test]
fn attachments_are_carried() {
    let root = tempfile::tempdir().unwrap();
    let source = root.path().join("somewhere.json");
    fs::write(&source, b"{\"a\": 1}").unwrap();
    let dir = root.path().join("step-00000001");
    save_parts(&dir, "s");
    let attachment = Attachment {
        name: "tokenizer.json".to_owned(),
        source,
    };
    commit(&dir, 2, "s", &meta(1), &[attachment], NO_WAIT).unwrap();
    let checkpoint = Checkpoint::open(&dir).unwrap();
    assert_eq!(checkpoint.attachments().count(), 1);
    assert_eq!(
        checkpoint.read_attachment("tokenizer.json", 100).unwrap(),
        b"{\"a\": 1}"
    );
    assert!(checkpoint.read_attachment("tokenizer.json", 3).is_err());
    assert!(checkpoint.read_attachment("other.json", 100).is_err());
    // A payload file is not handed out as an attachment.
    assert!(
        checkpoint
            .read_attachment("part-00000.s.safetensors", 1 << 20)
            .is_err()
    );
}

#[test]
fn wrong_requests_are_refused() {
    let root = tempfile::tempdir().unwrap();
    let checkpoint = Checkpoint::open(save_small(root.path(), 1)).unwrap();
    let mut out = [0.0; 4];
    let mut read = |tensor, range| checkpoint.read(tensor, StateKind::Master, range, &mut out);
    read("w", 26..30).unwrap();
    assert!(matches!(read("w", 27..31), Err(Error::Request { .. })));
    assert!(matches!(read("w", 0..5), Err(Error::Request { .. })));
    #[allow(clippy::reversed_empty_ranges)]
    let backwards = 9..5;
    assert!(matches!(read("w", backwards), Err(Error::Request { .. })));
    assert!(matches!(read("v", 0..4), Err(Error::NoSuchTensor { .. })));
}

#[test]
fn another_model_is_told_from_this_one() {
    let root = tempfile::tempdir().unwrap();
    let checkpoint = Checkpoint::open(save_small(root.path(), 1)).unwrap();
    let check = |expected: &[(&'static str, &'static [usize])]| {
        checkpoint
            .check_model(expected.iter().copied(), &STATES)
            .unwrap_err()
            .to_string()
    };
    let shape = check(&[("w", &[5, 6])]);
    assert!(
        shape.contains("`w`: shape [5, 6] expected, [6, 5] found"),
        "{shape}"
    );
    let missing = check(&[("w", &[6, 5]), ("v", &[1])]);
    assert!(
        missing.contains("tensor `v` of shape [1] is missing"),
        "{missing}"
    );
    let unexpected = check(&[]);
    assert!(
        unexpected.contains("1 tensor(s) that the model does not have"),
        "{unexpected}"
    );
}

/// Short types can be read, though this build writes fp32 only: the bytes of a payload are taken
/// for bfloat16 by a manifest that says so.
#[test]
fn short_types_are_read() {
    let root = tempfile::tempdir().unwrap();
    let dir = save_small(root.path(), 1);
    let path = dir.join("manifest.json");
    let mut manifest = seal::decode(&fs::read(&path).unwrap()).unwrap();
    manifest.tensors[0].states[0].dtype = Dtype::Bf16;
    fs::write(&path, seal::encode(&manifest).unwrap()).unwrap();
    let mut expected = Vec::new();
    for piece in &manifest.tensors[0].states[0].pieces {
        let bytes = fs::read(dir.join(&manifest.files[piece.file].name)).unwrap();
        let raw = &bytes[piece.offset as usize..][..2 * piece.region.len()];
        expected.extend(
            raw.chunks(2)
                .map(|raw| half::bf16::from_le_bytes([raw[0], raw[1]])),
        );
    }
    let checkpoint = Checkpoint::open(&dir).unwrap();
    let mut out = [0.0; 20];
    checkpoint
        .read("w", StateKind::Master, 5..25, &mut out)
        .unwrap();
    for (value, expected) in out.iter().zip(&expected[5..]) {
        assert_eq!(value.to_bits(), expected.to_f32().to_bits());
    }
}
