//! What tests of the built binary share: running it, and a tiny model, corpus and configuration in
//! a folder of its own that disappears with the test.

#![allow(dead_code, clippy::unwrap_used, clippy::panic, clippy::expect_used)]

pub mod runs;

use std::ffi::OsStr;
use std::fmt::Write as _;
use std::fs;
use std::io::{Read, Seek};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use tempfile::TempDir;

/// Longer than any command of a test may take on a loaded machine.
const TIME_OUT: Duration = Duration::from_secs(120);

/// One stage of 6 steps, for [`Fixture::config`].
pub const ONE_STAGE: &str = r#"
[[stage]]
name = "short"
seq_len = 64
steps = 6
batch_tokens = 256
"#;

/// Two stages of 4 steps; the second doubles the context and raises the RoPE base.
pub const TWO_STAGES: &str = r#"
[[stage]]
name = "short"
seq_len = 64
steps = 4
batch_tokens = 256

[[stage]]
name = "long"
seq_len = 128
rope_base = 40000.0
steps = 4
batch_tokens = 256
"#;

/// What a finished command left behind.
#[derive(Debug)]
pub struct Output {
    /// Exit code; `None` when a signal ended it.
    pub code: Option<i32>,
    pub stdout: String,
    pub stderr: String,
}

impl Output {
    /// Asserts success and hands the output on.
    #[track_caller]
    pub fn done(self) -> Self {
        assert_eq!(self.code, Some(0), "{}\n{}", self.stdout, self.stderr);
        self
    }

    /// Asserts an exit code and that standard error contains every one of `phrases`.
    #[track_caller]
    pub fn refused(self, code: i32, phrases: &[&str]) -> Self {
        assert_eq!(self.code, Some(code), "{}\n{}", self.stdout, self.stderr);
        for phrase in phrases {
            assert!(
                self.stderr.contains(phrase),
                "no {phrase:?} in:\n{}",
                self.stderr
            );
        }
        self
    }
}

/// The binary under test, with standard output and error in files: no pipe can fill up.
pub struct Running {
    pub child: Child,
    stdout: fs::File,
    stderr: fs::File,
    what: String,
}

/// Starts `oxitron` with these arguments and does not wait.
pub fn start<S: AsRef<OsStr>>(args: &[S]) -> Running {
    start_with(args, &[])
}

/// The same with variables added to its environment.
pub fn start_with<S: AsRef<OsStr>>(args: &[S], environment: &[(&str, &str)]) -> Running {
    start_program(env!("CARGO_BIN_EXE_oxitron"), args, environment)
}

/// The same of another program, which may start `oxitron` in its turn.
pub fn start_program<S: AsRef<OsStr>>(
    program: &str,
    args: &[S],
    environment: &[(&str, &str)],
) -> Running {
    let (stdout, stderr) = (tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap());
    let mut command = Command::new(program);
    command
        .args(args)
        // Tests run side by side; threads that wait for each other's cores would only spin.
        .env("OMP_NUM_THREADS", "1")
        .envs(environment.iter().copied())
        .stdin(Stdio::null())
        .stdout(stdout.try_clone().unwrap())
        .stderr(stderr.try_clone().unwrap());
    let what = format!("{command:?}");
    Running {
        child: command.spawn().unwrap(),
        stdout,
        stderr,
        what,
    }
}

impl Running {
    /// Waits for its end.
    pub fn wait(mut self) -> Output {
        let began = Instant::now();
        let status = loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                break status;
            }
            if began.elapsed() > TIME_OUT {
                self.child.kill().unwrap();
                self.child.wait().unwrap();
                panic!(
                    "{} runs for more than {TIME_OUT:?}:\n{}",
                    self.what,
                    text(self.stderr)
                );
            }
            std::thread::sleep(Duration::from_millis(5));
        };
        Output {
            code: status.code(),
            stdout: text(self.stdout),
            stderr: text(self.stderr),
        }
    }
}

fn text(mut file: fs::File) -> String {
    let mut bytes = Vec::new();
    file.rewind().unwrap();
    file.read_to_end(&mut bytes).unwrap();
    String::from_utf8_lossy(&bytes).into_owned()
}

/// Runs `oxitron` with these arguments to its end.
pub fn run<S: AsRef<OsStr>>(args: &[S]) -> Output {
    start(args).wait()
}

/// Runs `oxitron train CONFIG` with further arguments.
pub fn train(config: &Path, more: &[&str]) -> Output {
    let mut args = vec!["train", config.to_str().unwrap()];
    args.extend(more);
    run(&args)
}

/// A file or folder of `tests/golden`.
pub fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../tests/golden")
        .join(name)
}

/// Cuts a file to a length.
pub fn cut(path: &Path, bytes: u64) {
    let file = fs::File::options().write(true).open(path).unwrap();
    file.set_len(bytes).unwrap();
}

/// A folder with a corpus, a tokenizer (no more than 512 ids) and token shards, all made by the binary.
pub struct Fixture {
    folder: TempDir,
}

impl Fixture {
    /// Makes the folder and the data.
    pub fn new() -> Self {
        let fixture = Self {
            folder: tempfile::tempdir().unwrap(),
        };
        fs::write(fixture.path("corpus.jsonl"), corpus()).unwrap();
        let [corpus, tokenizer, shards] =
            ["corpus.jsonl", "tokenizer", "shards"].map(|name| fixture.text(name));
        let learn = ["data", "train-tokenizer", &corpus, "--out", &tokenizer];
        run(&[&learn[..], &["--vocab-size", "512"]].concat()).done();
        let encode = [
            "data",
            "tokenize",
            &corpus,
            "--tokenizer",
            &tokenizer,
            "--out",
            &shards,
        ];
        run(&[
            &encode[..],
            &["--row-group-tokens", "2000", "--threads", "1"],
        ]
        .concat())
        .done();
        fixture
    }

    /// Makes an empty folder: for what is refused before any data is opened.
    pub fn without_data() -> Self {
        Self {
            folder: tempfile::tempdir().unwrap(),
        }
    }

    /// All files and folders in the folder, as paths below it, sorted.
    pub fn files(&self) -> Vec<String> {
        let mut files = Vec::new();
        let mut folders = vec![self.folder.path().to_owned()];
        while let Some(folder) = folders.pop() {
            for entry in fs::read_dir(folder).unwrap() {
                let path = entry.unwrap().path();
                let name = path.strip_prefix(self.folder.path()).unwrap();
                files.push(name.to_str().unwrap().to_owned());
                if path.is_dir() {
                    folders.push(path);
                }
            }
        }
        files.sort();
        files
    }

    /// A path in the folder.
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// A path in the folder, as an argument.
    pub fn text(&self, name: &str) -> String {
        self.path(name).to_str().unwrap().to_owned()
    }

    /// The run directory of [`Fixture::config`].
    pub fn run_dir(&self) -> PathBuf {
        self.path("run")
    }

    /// Writes a configuration, `config.toml`: the tiny model in fp32 on one thread, the shards of
    /// the fixture, and `extra`, which holds the stages ([`ONE_STAGE`]) and whatever sections are
    /// wanted besides (`[validation]`, `[checkpoint]`, `[parallel]`). Single keys are changed by
    /// `--set`.
    pub fn config(&self, extra: &str) -> PathBuf {
        let path = self.path("config.toml");
        fs::write(&path, format!("{BASE}{extra}")).unwrap();
        path
    }

    /// The records of `metrics.jsonl`, one per line, as they stand in the file.
    pub fn metrics(&self) -> Vec<serde_json::Value> {
        let text = fs::read_to_string(self.run_dir().join("metrics.jsonl")).unwrap();
        text.lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect()
    }
}

const BASE: &str = r#"
[run]
name = "tiny"
dir = "run"
seed = 7
threads = 1

[model]
family = "llama"
vocab_size = 512
hidden_size = 64
intermediate_size = 176
num_layers = 2
num_heads = 4
num_kv_heads = 2
dtype = "fp32"

[data]
tokenizer = "tokenizer/tokenizer.json"
window_tokens = 4096

[[data.source]]
name = "words"
path = "shards/*.parquet"

[optimizer]
lr = 1e-3
"#;

/// 240 documents of 8 to 103 words, the same on every call; some 15 000 tokens.
fn corpus() -> String {
    const WORDS: [&str; 24] = [
        "harbour", "lantern", "the", "of", "under", "a", "river", "stone", "quiet", "northern",
        "carries", "and", "window", "seven", "morning", "turns", "letter", "garden", "slowly",
        "iron", "bridge", "between", "copper", "weather",
    ];
    let mut state = 1u64;
    let mut draw = |below: u64| {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        (state >> 33) % below
    };
    let mut lines = String::new();
    for _ in 0..240 {
        let words: Vec<&str> = (0..8 + draw(96))
            .map(|_| WORDS[draw(24) as usize])
            .collect();
        writeln!(lines, "{{\"text\": \"{}.\"}}", words.join(" ")).unwrap();
    }
    lines
}
