//! Samples of packed documents, out of the counter hash.

use tch::Device;

use crate::model::Batch;
use crate::testing::counter_hash;

/// A sample: tokens, targets, document starts.
pub type Sample = (Vec<i64>, Vec<i64>, Vec<u32>);

/// `count` samples of `seq_len` tokens, cut from documents of up to `longest`. A document that a
/// sample's end cuts still predicts its next token.
pub fn samples(
    stream: &str,
    [count, seq_len]: [usize; 2],
    vocab: usize,
    longest: u64,
) -> Vec<Sample> {
    let total = count * seq_len;
    let (tokens, documents) = counter_hash::documents(stream, total, vocab as u64, 1, longest);
    (0..count)
        .map(|index| {
            let range = index * seq_len..(index + 1) * seq_len;
            let begins = |&i: &usize| i == range.start || documents[i] != documents[i - 1];
            let target = |i: usize| match tokens.get(i + 1) {
                Some(&next) if documents[i + 1] == documents[i] => i64::from(next),
                _ => -100,
            };
            (
                tokens[range.clone()]
                    .iter()
                    .map(|&token| i64::from(token))
                    .collect(),
                range.clone().map(target).collect(),
                range
                    .clone()
                    .filter(begins)
                    .map(|i| (i - range.start) as u32)
                    .collect(),
            )
        })
        .collect()
}

/// One micro-batch of these samples.
pub fn batch<'a>(samples: impl IntoIterator<Item = &'a Sample>) -> Batch {
    let (mut tokens, mut targets, mut starts) = (Vec::new(), Vec::new(), Vec::new());
    for sample in samples {
        tokens.extend(&sample.0);
        targets.extend(&sample.1);
        starts.push(sample.2.clone());
    }
    let seq_len = tokens.len() / starts.len();
    Batch::new(&tokens, &targets, &starts, seq_len, Device::Cpu).unwrap()
}
