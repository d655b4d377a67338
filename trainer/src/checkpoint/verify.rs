//! Comparing a checkpoint's files with their checksums, wholly or where nobody else looks.

use super::read::LoadedChunk;
use super::{Checkpoint, Error, StateKind};

impl Checkpoint {
    /// Reads every chunk of every file and compares its checksum. `progress` is told the bytes
    /// checked and the bytes to check.
    ///
    /// # Errors
    /// The first damaged chunk or failed read.
    pub fn verify(&self, progress: &mut dyn FnMut(u64, u64)) -> Result<(), Error> {
        let chunks = self.files().iter().map(|file| file.chunks.len() as u64);
        let all = chunks
            .enumerate()
            .flat_map(|(file, count)| (0..count).map(move |number| (file, number)));
        self.verify_chunks(all.collect(), progress)
    }

    /// Verifies what those who read all elements of the states `read` between them do not touch: the
    /// chunks without an element of these states (headers, other states) and the attachments.
    /// Together with their reads, every byte of every file has then been compared with its checksum.
    /// On a resume one rank calls it, with all states.
    ///
    /// # Errors
    /// The first damaged chunk or failed read.
    pub fn verify_rest(
        &self,
        read: &[StateKind],
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<(), Error> {
        let files = self.files();
        let mut touched: Vec<Vec<bool>> = files
            .iter()
            .map(|file| vec![false; file.chunks.len()])
            .collect();
        let states = self.tensors().iter().flat_map(|tensor| &tensor.states);
        for state in states.filter(|state| read.contains(&state.state)) {
            for piece in &state.pieces {
                // Validated on opening: no piece is empty, and each lies in its file.
                let bytes = (piece.region.len() * state.dtype.bytes()) as u64;
                let size = files[piece.file].chunk_bytes;
                let (first, last) = (piece.offset / size, (piece.offset + bytes - 1) / size);
                touched[piece.file][first as usize..=last as usize].fill(true);
            }
        }
        let rest = touched.iter().enumerate().flat_map(|(file, touched)| {
            let untouched = touched.iter().enumerate().filter(|(_, touched)| !**touched);
            untouched.map(move |(number, _)| (file, number as u64))
        });
        self.verify_chunks(rest.collect(), progress)
    }

    /// Verifies chunks, each a file and its number in it.
    fn verify_chunks(
        &self,
        chunks: Vec<(usize, u64)>,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<(), Error> {
        let bytes_of = |(file, number): &(usize, u64)| {
            let file = &self.files()[*file];
            file.chunk_bytes.min(file.bytes - number * file.chunk_bytes)
        };
        let total = chunks.iter().map(bytes_of).sum();
        let mut done = 0;
        let mut chunk = LoadedChunk::default();
        progress(done, total);
        for (file, number) in chunks {
            self.load(&mut chunk, file, number, true)?;
            done += chunk.bytes.len() as u64;
            progress(done, total);
        }
        Ok(())
    }
}
