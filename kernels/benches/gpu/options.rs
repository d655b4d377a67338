//! The command line.

use std::path::PathBuf;
use std::time::Duration;

pub const USAGE: &str = "\
gpu [--filter NAME[,NAME]…] [--quick] [--json FILE] [--emulated]

Times every op on the first GPU beside a copy of memory and a product of matrices.

  --filter NAME  only ops whose names contain one of these parts
  --quick        few rounds
  --json FILE    write the line of JSON to this file, too
  --emulated     call every op on small tensors of the CPU; no time is taken

Exit code: 0; 1 where an op fails or misses its bar; 2 without a GPU, or for another option.";

/// What the command line asks for.
pub enum Request {
    /// How it is called.
    Help,
    /// To measure, or to try.
    Run(Options),
}

/// How to measure.
#[derive(Default)]
pub struct Options {
    /// Parts of names of the ops to measure; all where empty.
    pub filter: Vec<String>,
    /// Few rounds.
    pub quick: bool,
    /// Where the line of JSON goes beside stdout.
    pub json: Option<PathBuf>,
    /// Every op once, on the CPU.
    pub emulated: bool,
}

impl Options {
    /// # Errors
    /// A message for an option that there is not.
    pub fn parse(mut arguments: impl Iterator<Item = String>) -> Result<Request, String> {
        let mut options = Options::default();
        while let Some(argument) = arguments.next() {
            let mut value = || {
                let missing = || format!("{argument} needs a value\n\n{USAGE}");
                arguments.next().ok_or_else(missing)
            };
            match argument.as_str() {
                "--filter" => options
                    .filter
                    .extend(value()?.split(',').map(str::to_owned)),
                "--json" => options.json = Some(value()?.into()),
                "--quick" => options.quick = true,
                "--emulated" => options.emulated = true,
                "--help" | "-h" => return Ok(Request::Help),
                // `cargo bench` says it to every benchmark.
                "--bench" => {}
                other => return Err(format!("there is no option {other}\n\n{USAGE}")),
            }
        }
        Ok(Request::Run(options))
    }

    pub fn rounds(&self) -> usize {
        if self.quick { 3 } else { 11 }
    }

    /// How long an op is called in a round, about, and at least once.
    pub fn slice(&self) -> Duration {
        Duration::from_millis(if self.quick { 5 } else { 20 })
    }

    /// How long the GPU works before anything counts: until its clocks are those of a busy GPU.
    pub fn warm_up(&self) -> Duration {
        Duration::from_secs(if self.quick { 1 } else { 3 })
    }
}
