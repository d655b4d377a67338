//! `oxitron generate`: continues a text with a model.

use std::io::Write;
use std::path::PathBuf;

use anyhow::Result;
use oxitron_trainer::config::Dtype;
use oxitron_trainer::generate::{Generator, Sampling};

/// Continue a text with a model: a checkpoint, a run directory, or a Hugging Face folder
#[derive(Debug, clap::Args)]
pub struct GenerateArgs {
    /// Checkpoint folder, run directory (its newest checkpoint), or Hugging Face folder
    pub model: PathBuf,
    /// Text to continue
    #[arg(long)]
    pub prompt: String,
    /// Most tokens to add
    #[arg(long, default_value_t = 128)]
    pub max_tokens: usize,
    /// 0 always takes the likeliest token
    #[arg(long, default_value_t = 0.8)]
    pub temperature: f64,
    /// Draw from the likeliest tokens that together have this probability
    #[arg(long, default_value_t = 0.95)]
    pub top_p: f64,
    /// Seed of the draws
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    /// Read the checkpoint without comparing its checksums
    #[arg(long)]
    pub no_verify: bool,
}

/// Runs the command.
///
/// # Errors
/// A model that cannot be opened, or a request that it cannot serve.
pub fn run(args: &GenerateArgs) -> Result<()> {
    // fp32 gives the model's own answer on every processor.
    let mut generator = Generator::open(&args.model, Dtype::Fp32, !args.no_verify)?;
    let sampling = Sampling {
        temperature: args.temperature,
        top_p: args.top_p,
        seed: args.seed,
    };
    let mut out = std::io::stdout().lock();
    // The prompt stands before the first piece, not before a refusal.
    let mut prompt = Some(args.prompt.as_str());
    let mut written = Ok(());
    generator.generate(&args.prompt, args.max_tokens, sampling, &mut |text| {
        if written.is_ok() {
            let prompt = prompt.take().unwrap_or_default();
            written = write!(out, "{prompt}{text}").and_then(|()| out.flush());
        }
    })?;
    written?;
    writeln!(out, "{}", prompt.unwrap_or_default())?;
    Ok(())
}
