//! `oxitron convert`: to and from Hugging Face folders.

use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use clap::{Args as ClapArgs, Subcommand, ValueEnum};
use oxitron_trainer::checkpoint::{self, Dtype};
use oxitron_trainer::convert::{ExportOptions, from_hf, to_hf};

use crate::progress::{Progress, Unit};

/// Convert models to and from Hugging Face folders.
#[derive(Debug, ClapArgs)]
pub struct Args {
    #[command(subcommand)]
    direction: Direction,
}

#[derive(Debug, Subcommand)]
enum Direction {
    /// Write a checkpoint as a Hugging Face folder (LLaMA layout).
    ToHf {
        /// A checkpoint folder, or a run directory for its newest valid checkpoint.
        checkpoint: PathBuf,
        /// The folder to make.
        out: PathBuf,
        /// Element type of the weights.
        #[arg(long, value_enum, default_value_t = WeightType::Bf16)]
        dtype: WeightType,
        /// Where to start another safetensors file: bytes, or a number with KB, MB, GB, KiB, MiB or
        /// GiB.
        #[arg(long, value_name = "SIZE", default_value = "5GB", value_parser = parse_size)]
        max_shard_size: u64,
        /// Read the checkpoint without comparing its checksums.
        #[arg(long)]
        no_verify: bool,
    },
    /// Import a Hugging Face folder (LLaMA layout, safetensors) as a checkpoint of weights.
    FromHf {
        /// The Hugging Face folder.
        hf_dir: PathBuf,
        /// The checkpoint folder to make.
        out: PathBuf,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum WeightType {
    Bf16,
    Fp32,
    Fp16,
}

/// Runs the command.
pub fn run(args: Args) -> Result<()> {
    match args.direction {
        Direction::ToHf {
            checkpoint,
            out,
            dtype,
            max_shard_size,
            no_verify,
        } => {
            let dtype = match dtype {
                WeightType::Bf16 => Dtype::Bf16,
                WeightType::Fp32 => Dtype::F32,
                WeightType::Fp16 => Dtype::F16,
            };
            let mut checkpoint = checkpoint::find(&checkpoint)?;
            if no_verify {
                checkpoint = checkpoint.without_verification();
            }
            let options = ExportOptions {
                dtype,
                max_shard_bytes: max_shard_size,
            };
            let mut progress = Progress::new("export", Unit::Weights);
            let written = to_hf(&checkpoint, &out, &options, &mut |done, total| {
                progress.update(done, total);
            })
            .with_context(|| format!("cannot export {}", checkpoint.dir().display()))?;
            println!(
                "{}: {} of weights in {} file(s), from {}",
                out.display(),
                crate::inspect::size(written.tensor_bytes),
                written.shards,
                checkpoint.dir().display()
            );
        }
        Direction::FromHf { hf_dir, out } => {
            let mut progress = Progress::new("import", Unit::Weights);
            let imported = from_hf(&hf_dir, &out, &mut |done, total| {
                progress.update(done, total)
            })
            .with_context(|| format!("cannot import {}", hf_dir.display()))?;
            println!(
                "{}: {} weights in {} tensors, {}",
                out.display(),
                imported.parameters,
                imported.tensors,
                crate::inspect::size(imported.bytes)
            );
        }
    }
    Ok(())
}

/// Parses a size in bytes: `5GB` (powers of 1000), `512MiB` (powers of 1024), `1000000`.
fn parse_size(text: &str) -> Result<u64> {
    let digits = text
        .find(|letter: char| !letter.is_ascii_digit())
        .unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let scale: u64 = match unit.trim() {
        "" | "B" => 1,
        "KB" => 1_000,
        "MB" => 1_000_000,
        "GB" => 1_000_000_000,
        "KiB" => 1 << 10,
        "MiB" => 1 << 20,
        "GiB" => 1 << 30,
        other => bail!("unknown unit `{other}`; use KB, MB, GB, KiB, MiB or GiB"),
    };
    let number: u64 = number
        .parse()
        .context("a size starts with a whole number")?;
    match number.checked_mul(scale) {
        Some(size) if size > 0 => Ok(size),
        _ => bail!("a size of 1 byte to {} bytes is expected", u64::MAX),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn sizes_have_decimal_and_binary_units() {
        assert_eq!(parse_size("5GB").unwrap(), 5_000_000_000);
        assert_eq!(parse_size("512 MiB").unwrap(), 512 << 20);
        assert_eq!(parse_size("77").unwrap(), 77);
        for bad in ["", "GB", "5TB", "0", "-1", "1.5GB", "99999999999GB"] {
            assert!(parse_size(bad).is_err(), "{bad}");
        }
    }
}
