//! `oxitron data`: making token shards and looking at them.

use anyhow::{Context, Result, bail};
use clap::{Args, Subcommand, ValueEnum};
use oxitron_data::corpus::{Corpus, CorpusOptions, Format, ReadCounts};
use oxitron_data::tokenizer::{TextTokenizer, TrainOptions, train};
use oxitron_data::{Progress, TokenizeOptions, inspect, resolve, tokenize, verify};
use std::path::PathBuf;

/// Make token shards from text, and look at them.
#[derive(Debug, Subcommand)]
pub enum DataCommand {
    /// Learn a byte-level BPE tokenizer from text
    ///
    /// Writes tokenizer.json and tokenizer_config.json, which Hugging Face's libraries read too.
    /// The same text and options always give the same tokenizer.
    TrainTokenizer(TrainTokenizerArgs),
    /// Turn text into Parquet token shards
    ///
    /// Every document becomes one row: its token ids, the end-of-text token last. The output folder
    /// appears when all shards are written, so an interrupted run leaves nothing half-finished.
    Tokenize(TokenizeArgs),
    /// Print what token shards hold
    ///
    /// Files, documents, tokens, lengths and tokenizer; reads only footers and lengths.
    Inspect(InspectArgs),
    /// Re-read token shards completely and check them
    ///
    /// Checks checksums, counts and the range of token ids, and names every fault with file, row
    /// group and row. Exits with 1 if anything is wrong.
    Verify(VerifyArgs),
}

/// Which text to read.
#[derive(Debug, Args)]
pub struct CorpusArgs {
    /// Files and folders to read; a folder is read with everything below it, hidden names excepted
    #[arg(value_name = "INPUT", required_unless_present = "input_list")]
    inputs: Vec<PathBuf>,
    /// File that names further inputs, one path per line
    #[arg(long, value_name = "FILE")]
    input_list: Option<PathBuf>,
    /// How inputs are written: auto goes by extension (.jsonl, .ndjson, .parquet, else text)
    #[arg(long, value_enum, default_value = "auto")]
    format: FormatArg,
    /// JSONL field or Parquet column that holds the text
    #[arg(long, default_value = "text")]
    text_field: String,
    /// JSONL field or Parquet column that holds a unique id [default: a hash of the text]
    #[arg(long)]
    id_field: Option<String>,
    /// Take only files with these extensions from folders, separated by commas, such as rs,md,txt
    #[arg(long, value_delimiter = ',', value_name = "EXT")]
    extensions: Vec<String>,
    /// Leave out text files larger than this
    #[arg(long, value_name = "BYTES")]
    max_file_bytes: Option<u64>,
    /// Largest share of the corpus, by bytes, that one INPUT may have, such as 0.05; of a larger
    /// one, files are chosen by a hash of their names
    #[arg(long, value_name = "SHARE")]
    max_tree_share: Option<f64>,
}

/// [`Format`] on the command line.
#[derive(Debug, Clone, Copy, ValueEnum)]
enum FormatArg {
    Auto,
    Text,
    Jsonl,
    Parquet,
}

/// Options of `train-tokenizer`.
#[derive(Debug, Args)]
pub struct TrainTokenizerArgs {
    #[command(flatten)]
    corpus: CorpusArgs,
    /// Folder for tokenizer.json and tokenizer_config.json
    #[arg(long, value_name = "FOLDER")]
    out: PathBuf,
    /// Number of token ids, special tokens and the 256 single bytes included
    #[arg(long, default_value_t = 32768)]
    vocab_size: usize,
    /// Special token; may be repeated. The first one ends documents
    #[arg(
        long = "special",
        value_name = "TOKEN",
        default_value = "<|endoftext|>"
    )]
    special_tokens: Vec<String>,
    /// Learn from about this many bytes of text, drawn evenly from the whole corpus
    #[arg(long, value_name = "BYTES", default_value_t = 100_000_000)]
    sample_bytes: u64,
}

/// Options of `tokenize`.
#[derive(Debug, Args)]
pub struct TokenizeArgs {
    #[command(flatten)]
    corpus: CorpusArgs,
    /// A tokenizer.json in Hugging Face format, or the folder that holds it
    #[arg(long, value_name = "FILE")]
    tokenizer: PathBuf,
    /// Folder to create for the shards
    #[arg(long, value_name = "FOLDER")]
    out: PathBuf,
    /// Token that ends every document [default: the tokenizer's own end-of-text token]
    #[arg(long, value_name = "TOKEN")]
    eos: Option<String>,
    /// Tokens per row group, the unit in which shards are read and shuffled; for small data sets
    /// use less (a window of the training order holds at least one)
    #[arg(long, value_name = "TOKENS", default_value_t = 2_000_000)]
    row_group_tokens: usize,
    /// Tokens per shard file
    #[arg(long, value_name = "TOKENS", default_value_t = 250_000_000)]
    shard_tokens: u64,
    /// Threads that encode [default: one per core]
    #[arg(long, default_value_t = 0, hide_default_value = true)]
    threads: usize,
    /// Replace the output folder if it exists
    #[arg(long)]
    overwrite: bool,
}

/// Options of `inspect`.
#[derive(Debug, Args)]
pub struct InspectArgs {
    /// Shards, folders of shards, glob patterns, or a dataset.lock
    #[arg(value_name = "PATH", required = true)]
    paths: Vec<PathBuf>,
    /// The tokenizer that wrote them; shows the beginning of the first document as text
    #[arg(long, value_name = "FILE")]
    tokenizer: Option<PathBuf>,
}

/// Options of `verify`.
#[derive(Debug, Args)]
pub struct VerifyArgs {
    /// Shards, folders of shards, glob patterns, or a dataset.lock, whose files are compared with it
    #[arg(value_name = "PATH", required = true)]
    paths: Vec<PathBuf>,
}

/// Runs one `oxitron data` command.
///
/// # Errors
/// Whatever the command met; [`oxitron_data::Error::Option`] is a mistake on the command line.
pub fn run(command: DataCommand) -> Result<()> {
    match command {
        DataCommand::TrainTokenizer(args) => run_train_tokenizer(&args),
        DataCommand::Tokenize(args) => run_tokenize(&args),
        DataCommand::Inspect(args) => run_inspect(&args),
        DataCommand::Verify(args) => run_verify(&args),
    }
}

impl CorpusArgs {
    /// Finds the files and says what was found.
    fn scan(&self) -> Result<Corpus> {
        let mut inputs = self.inputs.clone();
        if let Some(list) = &self.input_list {
            let text = std::fs::read_to_string(list)
                .with_context(|| format!("cannot read the list of inputs {}", list.display()))?;
            let lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
            inputs.extend(lines.map(PathBuf::from));
        }
        let options = CorpusOptions {
            format: match self.format {
                FormatArg::Auto => Format::Auto,
                FormatArg::Text => Format::Text,
                FormatArg::Jsonl => Format::Jsonl,
                FormatArg::Parquet => Format::Parquet,
            },
            text_field: self.text_field.clone(),
            id_field: self.id_field.clone(),
            extensions: self.extensions.iter().map(|e| e.to_lowercase()).collect(),
            max_file_bytes: self.max_file_bytes,
            max_tree_share: self.max_tree_share,
            ..CorpusOptions::new(inputs)
        };
        let corpus = Corpus::scan(&options)?;
        let left_out = corpus.left_out();
        eprintln!(
            "{} files, {:.1} MB; left out: {} of other extensions, {} too large, {} beyond their \
             input's share",
            corpus.files().len(),
            corpus.bytes() as f64 / 1e6,
            left_out.other_extension,
            left_out.too_large,
            left_out.beyond_share
        );
        Ok(corpus)
    }
}

fn run_train_tokenizer(args: &TrainTokenizerArgs) -> Result<()> {
    let corpus = args.corpus.scan()?;
    let options = TrainOptions {
        vocab_size: args.vocab_size,
        special_tokens: args.special_tokens.clone(),
        sample_bytes: args.sample_bytes,
    };
    let progress = Progress::new("counting words", corpus.bytes());
    let report = train(&corpus, &options, &args.out, &progress)?;
    progress.finish();
    println!(
        "{}: {} ids from {} documents, {:.1} MB; {:.2} bytes per token; {:.1} s counting words, \
         {:.1} s finding merges",
        report.path.display(),
        report.vocab_size,
        report.documents,
        report.bytes as f64 / 1e6,
        report.bytes_per_token,
        report.count_seconds,
        report.merge_seconds
    );
    if report.vocab_size < args.vocab_size {
        eprintln!(
            "the text holds repeated pairs for {} ids only; set the model's vocab_size to that or \
             learn from more text",
            report.vocab_size
        );
    }
    Ok(())
}

fn run_tokenize(args: &TokenizeArgs) -> Result<()> {
    let tokenizer = TextTokenizer::load(&args.tokenizer, args.eos.as_deref())?;
    let corpus = args.corpus.scan()?;
    let options = TokenizeOptions {
        out: args.out.clone(),
        row_group_tokens: args.row_group_tokens,
        shard_tokens: args.shard_tokens,
        threads: args.threads,
        overwrite: args.overwrite,
    };
    let progress = Progress::new("tokenising", corpus.bytes());
    let report = tokenize(&corpus, &tokenizer, &options, &progress)?;
    progress.finish();
    let ReadCounts {
        documents,
        text_bytes,
        repaired,
        binary,
        empty,
    } = report.read;
    println!(
        "{}: {} shards, {documents} documents, {} tokens ({:.2} bytes per token) in {:.1} s: {:.1} \
         MB/s, {:.0} tokens/s",
        args.out.display(),
        report.shards.len(),
        report.tokens,
        text_bytes as f64 / report.tokens as f64,
        report.seconds,
        text_bytes as f64 / 1e6 / report.seconds,
        report.tokens as f64 / report.seconds
    );
    if repaired + binary + empty > 0 {
        println!(
            "{repaired} documents had invalid UTF-8 replaced; left out: {binary} binary files, \
             {empty} documents without text"
        );
    }
    Ok(())
}

fn run_inspect(args: &InspectArgs) -> Result<()> {
    let tokenizer = match &args.tokenizer {
        Some(path) => Some(TextTokenizer::load(path, None)?),
        None => None,
    };
    print!("{}", inspect(&args.paths, tokenizer.as_ref())?);
    Ok(())
}

fn run_verify(args: &VerifyArgs) -> Result<()> {
    let size = |path: &PathBuf| std::fs::metadata(path).map_or(0, |m| m.len());
    let shards: Vec<PathBuf> = args
        .paths
        .iter()
        .flat_map(|path| resolve(std::slice::from_ref(path)).unwrap_or_default())
        .collect();
    let progress = Progress::new("verifying", shards.iter().map(size).sum());
    let found = verify(&args.paths, &progress)?;
    progress.finish();
    if found.problems.is_empty() {
        println!(
            "{} files, {} documents, {} tokens: all right",
            found.files, found.documents, found.tokens
        );
        return Ok(());
    }
    for problem in &found.problems {
        println!("{problem}");
    }
    bail!("{} problems in {} files", found.problems.len(), found.files)
}
