//! The lines of ranks, put together from what `mpirun --tag-output` passes on.
//!
//! `mpirun` writes a tag such as `[1,0]<stderr>:` before every *piece* that it reads from a rank. A
//! piece is often a line, but a program that writes a line in several calls gets tags inside of it,
//! and pieces of two ranks may share a line.

use std::collections::BTreeMap;

/// Takes the tags out of one output of `mpirun`, line by line.
#[derive(Debug, Default)]
pub struct Untagger {
    /// Pieces of lines that have not ended yet, by rank.
    pending: BTreeMap<usize, String>,
}

impl Untagger {
    /// The line of a rank that ends with `line`, or the line of `mpirun` itself.
    pub fn line(&mut self, line: &str) -> (Option<usize>, String) {
        let mut rest = line;
        let mut last = None;
        while let Some((start, rank, length)) = find_tag(rest) {
            self.add(last, &rest[..start]);
            last = Some(rank);
            rest = &rest[start + length..];
        }
        match last {
            Some(rank) => {
                let mut text = self.pending.remove(&rank).unwrap_or_default();
                text.push_str(rest);
                (last, text)
            }
            None => (None, rest.to_owned()),
        }
    }

    fn add(&mut self, rank: Option<usize>, piece: &str) {
        if let Some(rank) = rank {
            self.pending.entry(rank).or_default().push_str(piece);
        }
    }
}

/// Where the first tag starts, the rank it names, and its length.
fn find_tag(text: &str) -> Option<(usize, usize, usize)> {
    text.match_indices('[').find_map(|(start, _)| {
        let rest = &text[start + 1..];
        let (job, rest) = rest.split_once(',')?;
        let (rank, rest) = rest.split_once(']')?;
        let is_number = |word: &str| !word.is_empty() && word.bytes().all(|b| b.is_ascii_digit());
        let rest = rest
            .strip_prefix("<stdout>:")
            .or_else(|| rest.strip_prefix("<stderr>:"))?;
        let rank = rank
            .parse()
            .ok()
            .filter(|_| is_number(job) && is_number(rank))?;
        Some((start, rank, text.len() - start - rest.len()))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn untag(lines: &[&str]) -> Vec<(Option<usize>, String)> {
        let mut untagger = Untagger::default();
        lines.iter().map(|line| untagger.line(line)).collect()
    }

    #[test]
    fn whole_lines_lose_their_tag_and_other_lines_stay() {
        let lines = untag(&[
            "[1,12]<stdout>:step 3 [a,b]",
            "mpirun was unable",
            "[1,0]<stderr>:",
        ]);
        let expected = [
            (Some(12), "step 3 [a,b]".to_owned()),
            (None, "mpirun was unable".to_owned()),
            (Some(0), String::new()),
        ];
        assert_eq!(lines, expected);
    }

    #[test]
    fn lines_in_pieces_come_back_whole_even_when_ranks_mix() {
        let lines = untag(&[
            "[1,1]<stderr>:error:[1,1]<stderr>: no [1,0]<stderr>:other",
            "[1,1]<stderr>:disk",
        ]);
        let expected = [
            (Some(0), "other".to_owned()),
            (Some(1), "error: no disk".to_owned()),
        ];
        assert_eq!(lines, expected);
    }
}
