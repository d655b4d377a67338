//! Saved on any mesh, loaded on any other: the same state, and the same training from there on.
//!
//! Every mesh trains, saves in the middle through the real checkpoint format, and goes on; every
//! mesh loads each of these checkpoints. What it holds then must be the saved tensors bit for bit,
//! all states of them, and its next losses those of the run that was never interrupted, with other
//! micro-batches too.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use super::ranks::{
    FROZEN, LR, Mesh, SAMPLES, micro_batches, model, on_every_rank, samples, setting,
};
use super::runner::{Runner, Setting, Staged, Weights, staged};
use super::samples::Sample;
use crate::checkpoint::{Checkpoint, ManifestMeta, PieceData, ScheduleState, commit, save_part};
use crate::comm::Comm;
use crate::config::{Dtype, ModelConfig};
use crate::plan::Home;
use crate::zero::StateKind;

/// Steps before the save.
const BEFORE: usize = 3;
/// Steps after it.
const AFTER: usize = 10;
/// What other orders of summation may change in a loss.
const BOUND: f64 = 1e-5;

/// All states of all tensors, as bits.
type State = BTreeMap<(String, StateKind), Vec<u32>>;

/// Every number of ranks in every ZeRO stage, whole and hybrid.
fn meshes() -> Vec<Mesh> {
    let whole =
        (0..4).flat_map(|stage| (1..=4).map(move |ranks| Mesh::new(stage, ranks, ranks, 1)));
    let hybrid = (1..4).map(|stage| Mesh::new(stage, 4, 2, 1));
    whole.chain(hybrid).collect()
}

/// The model of the other tests with a layer less: there are 361 pairs of meshes.
fn small(tied: bool, freeze: &[&str]) -> ModelConfig {
    ModelConfig {
        num_layers: 2,
        ..model(tied, freeze)
    }
}

fn name(mesh: &Mesh) -> String {
    format!(
        "ZeRO-{} on {} ranks in groups of {}, {} micro-batches, moments in {:?}",
        mesh.sharding.zero_stage, mesh.ranks, mesh.sharding.shard, mesh.accumulation, mesh.moments
    )
}

/// The tensors that the parts of all ranks make up, without a hole.
fn assemble(parts: impl IntoIterator<Item = Staged>) -> State {
    let mut state = State::new();
    let hole = f32::NAN.to_bits();
    for (part, values) in parts {
        let length = part.shape.iter().product();
        let tensor = state
            .entry((part.tensor, part.state))
            .or_insert_with(|| vec![hole; length]);
        for (bits, value) in tensor[part.range].iter_mut().zip(values) {
            assert_eq!(*bits, hole, "an element is staged twice");
            *bits = value.to_bits();
        }
    }
    assert!(!state.values().flatten().any(|bits| *bits == hole));
    state
}

/// The tensors of a checkpoint.
fn contents(checkpoint: &Checkpoint) -> State {
    let mut state = State::new();
    for tensor in checkpoint.tensors() {
        for stored in &tensor.states {
            let values = checkpoint.read_whole(&tensor.name, stored.state).unwrap();
            let bits = values.into_iter().map(f32::to_bits).collect();
            state.insert((tensor.name.clone(), stored.state), bits);
        }
    }
    state
}

/// The state with moments rounded to bf16.
fn rounded(state: &State) -> State {
    let round = |bits: &u32| {
        let value = half::bf16::from_f32(f32::from_bits(*bits));
        value.to_f32().to_bits()
    };
    let entry = |((name, kind), bits): (&(String, StateKind), &Vec<u32>)| {
        let bits = match kind {
            StateKind::Master => bits.clone(),
            StateKind::ExpAvg | StateKind::ExpAvgSq => bits.iter().map(round).collect(),
        };
        ((name.clone(), *kind), bits)
    };
    state.iter().map(entry).collect()
}

fn save(runner: &mut Runner, comm: &Comm, folder: &Path) -> Vec<Staged> {
    let staged = staged(&mut runner.zero);
    let pieces: Vec<PieceData<'_>> = staged
        .iter()
        .map(|(part, values)| PieceData {
            tensor: &part.tensor,
            state: part.state,
            shape: &part.shape,
            range: part.range.clone(),
            data: values,
        })
        .collect();
    let (rank, world) = (comm.rank(), comm.world());
    save_part(folder, rank, world, "1-3", &pieces).unwrap();
    if rank == 0 {
        let meta = ManifestMeta {
            step: BEFORE as u64,
            schedule: ScheduleState {
                adam_step: runner.adam_step,
                ..ScheduleState::default()
            },
            ..ManifestMeta::default()
        };
        let patience = Duration::from_secs(60);
        commit(folder, world, "1-3", &meta, &[], patience).unwrap();
    }
    staged
}

/// The losses of steps.
fn walk(runner: &mut Runner, comm: &Comm, mesh: &Mesh, steps: &[Sample]) -> Vec<f64> {
    let step = |samples: &[Sample]| {
        let mine = micro_batches(samples, comm.rank(), mesh.ranks, mesh.accumulation);
        runner.step(&mine, LR).record.mean_loss
    };
    steps.chunks(SAMPLES).map(step).collect()
}

/// Trains on a mesh and saves in the middle: the losses, and what was saved.
fn train_and_save(model: &ModelConfig, mesh: Mesh, folder: &Path) -> (Vec<f64>, State) {
    let samples = samples(model.vocab_size);
    let (before, rest) = samples.split_at(BEFORE * SAMPLES);
    let setting = setting(model, mesh);
    let train = |comm: &Comm| {
        let mut runner = Runner::new(setting, comm);
        let mut losses = walk(&mut runner, comm, &mesh, before);
        let staged = save(&mut runner, comm, folder);
        losses.extend(walk(&mut runner, comm, &mesh, &rest[..AFTER * SAMPLES]));
        (losses, staged)
    };
    let results = on_every_rank(mesh.ranks, |comm| mesh.on_its_kernels(|| train(comm)));
    let losses = results[0].0.clone();
    let state = assemble(results.into_iter().flat_map(|(_, staged)| staged));
    (losses, state)
}

/// Loads on a mesh and goes on: the state as it was loaded, and the losses.
fn load_and_train(model: &ModelConfig, mesh: Mesh, checkpoint: &Checkpoint) -> (State, Vec<f64>) {
    let samples = samples(model.vocab_size);
    let rest = &samples[BEFORE * SAMPLES..][..AFTER * SAMPLES];
    let setting = Setting {
        weights: Weights::Checkpoint(checkpoint),
        ..setting(model, mesh)
    };
    let train = |comm: &Comm| {
        let mut runner = Runner::new(setting, comm);
        let staged = staged(&mut runner.zero);
        (staged, walk(&mut runner, comm, &mesh, rest))
    };
    let results = on_every_rank(mesh.ranks, |comm| mesh.on_its_kernels(|| train(comm)));
    let losses = results[0].1.clone();
    let state = assemble(results.into_iter().flat_map(|(staged, _)| staged));
    (state, losses)
}

/// The greatest relative difference of two rows of losses.
fn difference(losses: &[f64], reference: &[f64]) -> f64 {
    assert_eq!(losses.len(), reference.len());
    let pairs = losses.iter().zip(reference);
    pairs.map(|(a, b)| (a / b - 1.0).abs()).fold(0.0, f64::max)
}

/// Saves on the meshes of one ZeRO stage, loads on all.
fn every_pair(zero_stage: u8, tied: bool, freeze: &[&str]) {
    let model = small(tied, freeze);
    let scratch = tempfile::tempdir().unwrap();
    let alone = train_and_save(&model, Mesh::alone(), &scratch.path().join("alone"));
    let mut worst = 0f64;
    let meshes = meshes();
    let saving = meshes.iter().enumerate();
    for (number, &saver) in saving.filter(|(_, mesh)| mesh.sharding.zero_stage == zero_stage) {
        let folder = scratch.path().join(number.to_string());
        let (losses, saved) = train_and_save(&model, saver, &folder);
        let error = difference(&losses, &alone.0);
        assert!(
            error <= BOUND,
            "{}: losses differ by {error:e}",
            name(&saver)
        );
        let checkpoint = Checkpoint::open(&folder).unwrap();
        assert!(contents(&checkpoint) == saved, "{}: saved", name(&saver));
        for (other, &loader) in meshes.iter().enumerate() {
            let loader = Mesh {
                // The same mesh goes on with the same micro-batches, so that it can be held to bits.
                accumulation: if (number + other) % 4 == 1 { 2 } else { 1 },
                ..loader
            };
            let what = format!("from {} to {}", name(&saver), name(&loader));
            let (loaded, resumed) = load_and_train(&model, loader, &checkpoint);
            assert!(loaded == saved, "{what}: another state");
            let error = difference(&resumed, &alone.0[BEFORE..]);
            assert!(error <= BOUND, "{what}: losses differ by {error:e}");
            if other == number {
                assert_eq!(
                    resumed,
                    losses[BEFORE..],
                    "{what}: the same mesh, other bits"
                );
            }
            worst = worst.max(error);
        }
    }
    println!("saved with ZeRO-{zero_stage}: losses within {worst:.1e}");
}

#[test]
fn ranks_that_saved_with_zero_0_resume_on_every_mesh() {
    every_pair(0, false, &[]);
}

#[test]
fn ranks_that_saved_with_zero_1_resume_on_every_mesh() {
    every_pair(1, true, &[]);
}

#[test]
fn ranks_that_saved_with_zero_2_resume_on_every_mesh() {
    every_pair(2, false, &FROZEN);
}

#[test]
fn ranks_that_saved_with_zero_3_resume_on_every_mesh() {
    every_pair(3, true, &FROZEN);
}

/// Optimizer state in host memory passes through the device without a trace: the same bits as where
/// it lies there, saved, loaded on the other side, and trained on.
#[test]
fn state_in_host_memory_changes_no_bit_and_moves_to_the_device_and_back() {
    let model = small(true, &FROZEN);
    let scratch = tempfile::tempdir().unwrap();
    for (ranks, shard) in [(1, 1), (2, 2)] {
        for zero_stage in 0..4 {
            let on = |home: Home, moments: Dtype| Mesh {
                home,
                moments,
                emulated: true,
                ..Mesh::new(zero_stage, ranks, shard, 2)
            };
            for moments in [Dtype::Fp32, Dtype::Bf16] {
                let save = |home: Home| {
                    let folder = format!("{zero_stage}-{ranks}-{moments:?}-{home:?}");
                    let folder = scratch.path().join(folder);
                    let trained = train_and_save(&model, on(home, moments), &folder);
                    (trained, Checkpoint::open(&folder).unwrap())
                };
                let (device, device_checkpoint) = save(Home::Device);
                let (host, host_checkpoint) = save(Home::Host);
                let what = format!("ZeRO-{zero_stage} on {ranks} ranks, moments {moments:?}");
                assert_eq!(host.0, device.0, "{what}: losses");
                assert!(host.1 == device.1, "{what}: state");
                for (home, checkpoint) in [
                    (Home::Host, &device_checkpoint),
                    (Home::Device, &host_checkpoint),
                ] {
                    let mesh = on(home, moments);
                    let (loaded, resumed) = load_and_train(&model, mesh, checkpoint);
                    assert!(loaded == device.1, "{what}: loaded on {home:?}");
                    assert_eq!(resumed, device.0[BEFORE..], "{what}: resumed on {home:?}");
                }
            }
        }
    }
}

/// Moments that lie in host memory are forgotten, and the weights stay.
#[test]
fn moments_in_host_memory_begin_afresh() {
    let model = small(false, &[]);
    let mesh = Mesh {
        home: Home::Host,
        emulated: true,
        ..Mesh::alone()
    };
    let samples = samples(model.vocab_size);
    let (before, after) = mesh.on_its_kernels(|| {
        let comm = Comm::solo();
        let mut runner = Runner::new(setting(&model, mesh), &comm);
        walk(&mut runner, &comm, &mesh, &samples[..SAMPLES]);
        let before = assemble(staged(&mut runner.zero));
        runner.zero.reset_moments().unwrap();
        (before, assemble(staged(&mut runner.zero)))
    });
    for ((name, kind), bits) in after {
        let moved = &before[&(name, kind)];
        if kind == StateKind::Master {
            assert!(bits == *moved);
        } else {
            assert!(bits.iter().all(|&bits| bits == 0) && moved.iter().any(|&bits| bits != 0));
        }
    }
}

/// Moments in bf16 come back bit for bit on any mesh, also into fp32; those in fp32 are rounded
/// when they are loaded into bf16.
#[test]
fn ranks_with_other_moments_resume_each_other() {
    let model = small(true, &FROZEN);
    let scratch = tempfile::tempdir().unwrap();
    let with = |mesh: Mesh, moments: Dtype| Mesh { moments, ..mesh };
    let meshes = [
        Mesh::new(0, 1, 1, 1),
        Mesh::new(1, 3, 3, 2),
        Mesh::new(2, 4, 2, 1),
        Mesh::new(3, 4, 4, 4),
    ];
    let save = |moments: Dtype| {
        let folder = scratch.path().join(format!("{moments:?}"));
        let mesh = with(Mesh::new(3, 2, 2, 1), moments);
        let (losses, saved) = train_and_save(&model, mesh, &folder);
        let checkpoint = Checkpoint::open(&folder).unwrap();
        assert!(contents(&checkpoint) == saved, "{moments:?}");
        (losses, saved, checkpoint)
    };
    let (exact, wide, wide_checkpoint) = save(Dtype::Fp32);
    let (coarse, narrow, narrow_checkpoint) = save(Dtype::Bf16);
    assert!(
        rounded(&narrow) == narrow,
        "moments in bf16 are saved as they are"
    );
    assert!(
        rounded(&wide) != wide,
        "moments in fp32 have more bits than bf16"
    );
    let rounding = difference(&coarse, &exact);
    println!("bf16 moments change losses by {rounding:.1e}");
    assert!(rounding > 0.0, "bf16 moments must make a difference");
    for mesh in meshes {
        for (moments, checkpoint, expected, losses) in [
            (Dtype::Bf16, &narrow_checkpoint, narrow.clone(), &coarse),
            (Dtype::Fp32, &narrow_checkpoint, narrow.clone(), &coarse),
            (Dtype::Bf16, &wide_checkpoint, rounded(&wide), &exact),
        ] {
            let mesh = with(mesh, moments);
            let (loaded, resumed) = load_and_train(&model, mesh, checkpoint);
            assert!(loaded == expected, "{}: another state", name(&mesh));
            let error = difference(&resumed, &losses[BEFORE..]);
            println!("{}: losses within {error:.1e}", name(&mesh));
            assert!(
                error <= BOUND,
                "{}: losses differ by {error:e}",
                name(&mesh)
            );
        }
    }
}
