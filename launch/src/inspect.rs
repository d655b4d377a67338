//! `oxitron inspect`: what a checkpoint holds.

use std::fmt::Write as _;
use std::io::{self, Write as _};
use std::path::PathBuf;

use anyhow::Result;
use clap::Args as ClapArgs;
use oxitron_trainer::checkpoint::{self, Checkpoint, FileKind, StateEntry};

use crate::progress::{Progress, Unit};

/// Print what a checkpoint holds.
#[derive(Debug, ClapArgs)]
pub struct Args {
    /// A checkpoint folder, or a run directory for its newest valid checkpoint.
    checkpoint: PathBuf,
    /// Read every byte again and compare all checksums.
    #[arg(long)]
    verify: bool,
}

/// Runs the command.
pub fn run(args: Args) -> Result<()> {
    let checkpoint = checkpoint::find(&args.checkpoint)?;
    print(&describe(&checkpoint)?)?;
    if args.verify {
        let mut progress = Progress::new("verify", Unit::Bytes);
        let mut bytes = 0;
        checkpoint.verify(&mut |done, total| {
            bytes = total;
            progress.update(done, total);
        })?;
        let chunks: usize = checkpoint
            .files()
            .iter()
            .map(|file| file.chunks.len())
            .sum();
        print(&format!(
            "verified   {chunks} chunks, {}: all checksums are right\n",
            size(bytes)
        ))?;
    }
    Ok(())
}

/// Writes to standard output. A reader that has seen enough (`| head`) is no error.
fn print(text: &str) -> io::Result<()> {
    match io::stdout().write_all(text.as_bytes()) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        other => other,
    }
}

/// Describes a checkpoint, a line per fact, tensor and file.
fn describe(checkpoint: &Checkpoint) -> Result<String, std::fmt::Error> {
    let meta = checkpoint.meta();
    let mut text = String::new();
    let out = &mut text;
    writeln!(out, "checkpoint {}", checkpoint.dir().display())?;
    let parent = meta.parent.as_deref().unwrap_or("none");
    writeln!(
        out,
        "run        {}, attempt {}, parent {parent}",
        meta.run_id, meta.attempt
    )?;
    writeln!(out, "step       {}", meta.step)?;
    writeln!(
        out,
        "saved as   {}, save id {}",
        meta.purpose,
        checkpoint.save_id()
    )?;
    writeln!(out, "tokens     {}", meta.tokens)?;
    match &meta.stage {
        Some(stage) => writeln!(
            out,
            "stage      {} `{}`, seq_len {}, rope_base {}",
            stage.index, stage.name, stage.seq_len, stage.rope_base
        )?,
        None => writeln!(out, "stage      none yet")?,
    }
    match meta.next_stage {
        Some(next) => writeln!(
            out,
            "next       stage {next} after {} of its steps, Adam's time {}",
            meta.schedule.step_in_stage, meta.schedule.adam_step
        )?,
        None => writeln!(
            out,
            "next       nothing: training is done, or this is an import"
        )?,
    }
    writeln!(
        out,
        "dataset    {}",
        meta.dataset_lock.as_deref().unwrap_or("none")
    )?;
    writeln!(out, "cursor     {}", meta.cursor)?;
    for skipped in &meta.skipped {
        let last = skipped
            .first_sample
            .saturating_add(skipped.samples)
            .saturating_sub(1);
        writeln!(
            out,
            "skipped    step {}: samples {} to {last}",
            skipped.step, skipped.first_sample
        )?;
    }
    for (key, value) in &meta.choices {
        writeln!(out, "choice     {key} = {value}")?;
    }
    describe_tensors(checkpoint, out)?;
    writeln!(out, "files      {}", checkpoint.files().len())?;
    for file in checkpoint.files() {
        let kind = match file.kind {
            FileKind::Payload => "payload",
            FileKind::Attachment => "attachment",
        };
        let (bytes, chunks) = (size(file.bytes), file.chunks.len());
        writeln!(
            out,
            "  {:<44} {kind:<10} {bytes:>12}  {chunks} chunk(s)",
            file.name
        )?;
    }
    Ok(text)
}

fn describe_tensors(checkpoint: &Checkpoint, out: &mut String) -> std::fmt::Result {
    let tensors = checkpoint.tensors();
    let elements = |shape: &[usize]| shape.iter().product::<usize>() as u64;
    let parameters: u64 = tensors.iter().map(|tensor| elements(&tensor.shape)).sum();
    writeln!(out, "tensors    {}, {parameters} parameters", tensors.len())?;
    let width = tensors
        .iter()
        .map(|tensor| tensor.name.len())
        .max()
        .unwrap_or(0);
    for tensor in tensors {
        let bytes_of = |state: &StateEntry| elements(&tensor.shape) * state.dtype.bytes() as u64;
        let bytes = tensor.states.iter().map(bytes_of).sum();
        let states: Vec<String> = tensor
            .states
            .iter()
            .map(|state| {
                format!(
                    "{} {} in {}",
                    state.state,
                    state.dtype.name(),
                    state.pieces.len()
                )
            })
            .collect();
        let shape = format!("{:?}", tensor.shape);
        let (bytes, states) = (size(bytes), states.join(", "));
        writeln!(
            out,
            "  {:<width$}  {shape:<16} {bytes:>12}  {states}",
            tensor.name
        )?;
    }
    Ok(())
}

/// A number of bytes for people.
pub fn size(bytes: u64) -> String {
    let units = ["KiB", "MiB", "GiB", "TiB"];
    if bytes < 1024 {
        return format!("{bytes} B");
    }
    let mut value = bytes as f64 / 1024.0;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < units.len() {
        value /= 1024.0;
        unit += 1;
    }
    format!("{value:.1} {}", units[unit])
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use oxitron_trainer::checkpoint::{
        ManifestMeta, PieceData, Purpose, SkippedRange, StageMark, StateKind, commit, save_part,
    };
    use std::time::Duration;

    #[test]
    fn a_description_names_run_step_stage_tensors_and_files() {
        let folder = tempfile::tempdir().unwrap();
        let dir = folder.path().join("step-00000007");
        let pieces = [PieceData {
            tensor: "model.norm.weight",
            state: StateKind::Master,
            shape: &[300],
            range: 0..300,
            data: &[1.0; 300],
        }];
        save_part(&dir, 0, 1, "1-7", &pieces).unwrap();
        let meta = ManifestMeta {
            run_id: "harbour".to_owned(),
            attempt: 2,
            step: 7,
            purpose: Purpose::StageEnd,
            skipped: vec![SkippedRange {
                step: 5,
                first_sample: 80,
                samples: 16,
            }],
            tokens: 7 * 4096,
            stage: Some(StageMark {
                name: "4k".to_owned(),
                seq_len: 4096,
                ..Default::default()
            }),
            cursor: serde_json::json!({"web": [0, 1, 2]}),
            ..Default::default()
        };
        commit(&dir, 1, "1-7", &meta, &[], Duration::ZERO).unwrap();
        let text = describe(&Checkpoint::open(&dir).unwrap()).unwrap();
        for fact in [
            "harbour, attempt 2",
            "step       7\n",
            "saved as   stage_end, save id 1-7\n",
            "skipped    step 5: samples 80 to 95\n",
            "tokens     28672\n",
            "`4k`, seq_len 4096",
            "{\"web\":[0,1,2]}",
            "1, 300 parameters",
            "model.norm.weight  [300]",
            "1.2 KiB  master F32 in 1",
            "part-00000.1-7.safetensors",
        ] {
            assert!(text.contains(fact), "{fact:?} is not in\n{text}");
        }
    }

    #[test]
    fn sizes_are_readable() {
        assert_eq!(size(1023), "1023 B");
        assert_eq!(size(1536), "1.5 KiB");
        assert_eq!(size(3 << 30), "3.0 GiB");
    }
}
