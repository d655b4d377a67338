//! Damage is detected, wherever it is.

use std::fs;

use super::*;

/// A small generator with a fixed seed, so that a failure can be looked at again.
pub(super) struct Xorshift(pub(super) u64);

impl Xorshift {
    pub(super) fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % limit as u64) as usize
    }
}

const CHUNK: u64 = 64;

/// Two parts and an attachment in chunks so small that a file has many, among them some without an
/// element.
fn save_in_small_chunks(root: &Path) -> PathBuf {
    let dir = root.join(folder_name(1));
    let source = root.join("tokenizer.source");
    fs::write(&source, [b'x'; 1000]).unwrap();
    let name = "tokenizer.json".to_owned();
    save_parts(&dir, "1-1");
    let attachments = [Attachment { name, source }];
    commit(&dir, 2, "1-1", &meta(1), &attachments, NO_WAIT).unwrap();
    let path = dir.join("manifest.json");
    let mut manifest = seal::decode(&fs::read(&path).unwrap()).unwrap();
    for file in &mut manifest.files {
        let bytes = fs::read(dir.join(&file.name)).unwrap();
        file.chunk_bytes = CHUNK;
        file.chunks = bytes
            .chunks(CHUNK as usize)
            .map(|chunk| seal::hex(xxhash_rust::xxh3::xxh3_128(chunk)))
            .collect();
    }
    fs::write(&path, seal::encode(&manifest).unwrap()).unwrap();
    dir
}

/// What a resume looks at: every rank its elements, and one rank the rest. Says what failed.
fn resume(dir: &Path, ranks: usize) -> Result<(), &'static str> {
    let open = || Checkpoint::open(dir).map_err(|_| "opening");
    for rank in 0..ranks {
        let checkpoint = open()?;
        let range = rank * 30 / ranks..(rank + 1) * 30 / ranks;
        let mut out = vec![0.0; range.len()];
        for state in STATES {
            let read = checkpoint.read("w", state, range.clone(), &mut out);
            read.map_err(|_| "reading")?;
        }
    }
    let rest = open()?.verify_rest(&STATES, &mut |_, _| {});
    rest.map_err(|_| "verifying the rest")
}

/// Any byte of any file: opening, the reads of the ranks, or the look at the rest finds it. With
/// `OXITRON_FLIPS` in the environment so many are changed in place of 50.
#[test]
fn every_changed_byte_is_detected_by_a_resume() {
    let flips = std::env::var("OXITRON_FLIPS").map_or(50, |count| count.parse().unwrap());
    let root = tempfile::tempdir().unwrap();
    let dir = save_in_small_chunks(root.path());
    let mut random = Xorshift(0x5EED);
    let files = names(&dir);
    assert_eq!(files.len(), 4);
    let mut found = std::collections::BTreeMap::new();
    for flip in 0..flips {
        let name = &files[flip % files.len()];
        let path = dir.join(name);
        let sound = fs::read(&path).unwrap();
        let mut bytes = sound.clone();
        let (byte, change) = (random.below(bytes.len()), 1 + random.below(255) as u8);
        bytes[byte] ^= change;
        fs::write(&path, bytes).unwrap();
        let place = format!("byte {byte} of {name}, changed by {change:#x}");
        let ranks = 1 + random.below(4);
        let by = resume(&dir, ranks).expect_err(&place);
        *found.entry(by).or_insert(0) += 1;
        assert!(read_all(&dir).is_err(), "{place}");
        fs::write(&path, sound).unwrap();
    }
    // Files cut short, and files with something behind their end.
    let cuts = 10 + flips / 10;
    for cut in 0..cuts {
        let path = dir.join(&files[cut % files.len()]);
        let sound = fs::read(&path).unwrap();
        let mut bytes = sound.clone();
        if cut % 5 == 0 {
            bytes.push(random.below(256) as u8);
        } else {
            bytes.truncate(random.below(bytes.len()));
        }
        fs::write(&path, bytes).unwrap();
        assert_eq!(resume(&dir, 2), Err("opening"), "{}", path.display());
        fs::write(&path, sound).unwrap();
    }
    assert_eq!(resume(&dir, 3), Ok(()));
    println!("{flips} changed bytes, found by: {found:?}; {cuts} changed lengths, by opening");
    // All three have something to find.
    assert_eq!(found.len(), 3, "{found:?}");
    assert_eq!(found.values().sum::<usize>(), flips);
    println!("{{\"flips\":{flips}}}");
}

/// A rank reads the chunks that hold its elements, each once, and no others; what no rank reads is
/// what the look at the rest reads.
#[test]
fn a_rank_reads_only_what_it_needs() {
    let root = tempfile::tempdir().unwrap();
    let dir = save_in_small_chunks(root.path());
    let opened = Checkpoint::open(&dir).unwrap();
    assert_eq!(opened.bytes_read(), 0);
    let total: u64 = opened.files().iter().map(|file| file.bytes).sum();
    let chunk_bytes = |file: usize, chunk: u64| {
        let bytes = opened.files()[file].bytes;
        CHUNK.min(bytes - chunk * CHUNK)
    };
    let chunks_of = |range: &std::ops::Range<usize>| {
        let tensor = opened.tensor("w").unwrap();
        let mut chunks = std::collections::BTreeSet::new();
        for piece in tensor.states.iter().flat_map(|state| &state.pieces) {
            let held = piece.region.as_flat(&tensor.shape).unwrap();
            for element in range.clone().filter(|element| held.contains(element)) {
                let byte = piece.offset + 4 * (element - held.start) as u64;
                chunks.insert((piece.file, byte / CHUNK));
            }
        }
        chunks
    };
    // As it was saved: the parts of the ranks follow each other in the files.
    let mut all = std::collections::BTreeSet::new();
    for range in [0..13, 13..30] {
        let checkpoint = Checkpoint::open(&dir).unwrap();
        let mut out = vec![0.0; range.len()];
        for state in STATES {
            checkpoint
                .read("w", state, range.clone(), &mut out)
                .unwrap();
            assert_eq!(out, values(0, state, 30)[range.clone()]);
        }
        let chunks = chunks_of(&range);
        let needed: u64 = chunks
            .iter()
            .map(|(file, chunk)| chunk_bytes(*file, *chunk))
            .sum();
        assert_eq!(checkpoint.bytes_read(), needed);
        assert!(needed < total / 2, "{needed} of {total}");
        all.extend(chunks);
    }
    let read: u64 = all
        .iter()
        .map(|(file, chunk)| chunk_bytes(*file, *chunk))
        .sum();
    let (mut first, mut last) = (None, (0, 0));
    opened
        .verify_rest(&STATES, &mut |done, of| {
            first.get_or_insert((done, of));
            last = (done, of);
        })
        .unwrap();
    assert_eq!(first, Some((0, total - read)));
    assert_eq!(last, (total - read, total - read));
    assert_eq!(opened.bytes_read(), total - read);
    // Whoever reads fewer states leaves more to verify.
    let weights = Checkpoint::open(&dir).unwrap();
    weights
        .verify_rest(&[StateKind::Master], &mut |_, _| {})
        .unwrap();
    assert!(weights.bytes_read() > total - read);
    // On another mesh a chunk at a border may be read again for the next state.
    for rank in 0..5 {
        let range = rank * 6..rank * 6 + 6;
        let checkpoint = Checkpoint::open(&dir).unwrap();
        let mut out = vec![0.0; 6];
        for state in STATES {
            checkpoint
                .read("w", state, range.clone(), &mut out)
                .unwrap();
        }
        let needed = chunks_of(&range).len() as u64 * CHUNK;
        assert!(checkpoint.bytes_read() <= 2 * needed, "rank {rank}");
    }
}

#[test]
fn verification_can_be_declined() {
    let root = tempfile::tempdir().unwrap();
    let dir = save_in_small_chunks(root.path());
    let path = dir.join("part-00000.1-1.safetensors");
    let mut bytes = fs::read(&path).unwrap();
    let last = bytes.len() - 1;
    bytes[last] ^= 0x80;
    fs::write(&path, bytes).unwrap();
    fs::write(dir.join("tokenizer.json"), [b'y'; 1000]).unwrap();
    let mut out = [0.0; 13];
    let checkpoint = Checkpoint::open(&dir).unwrap();
    let read = checkpoint.read("w", StateKind::ExpAvgSq, 0..13, &mut out);
    assert!(matches!(read, Err(Error::Chunk { .. })));
    assert!(checkpoint.read_attachment("tokenizer.json", 1000).is_err());

    let checkpoint = checkpoint.without_verification();
    checkpoint
        .read("w", StateKind::ExpAvgSq, 0..13, &mut out)
        .unwrap();
    let expected = values(0, StateKind::ExpAvgSq, 13);
    assert_eq!(out[..12], expected[..12]);
    assert_eq!(out[12], -expected[12]);
    assert_eq!(
        checkpoint.read_attachment("tokenizer.json", 1000).unwrap(),
        [b'y'; 1000]
    );
    // Whoever asks for it gets it all the same.
    assert!(checkpoint.verify(&mut |_, _| {}).is_err());
    assert!(checkpoint.verify_rest(&STATES, &mut |_, _| {}).is_err());
}

/// The manifest's checksum leaves out no bit of the file.
#[test]
fn every_bit_of_the_manifest_counts() {
    let root = tempfile::tempdir().unwrap();
    let dir = save_small(root.path(), 1);
    let mut bytes = fs::read(dir.join("manifest.json")).unwrap();
    seal::decode(&bytes).unwrap();
    for index in 0..bytes.len() {
        for bit in 0..8 {
            bytes[index] ^= 1 << bit;
            assert!(seal::decode(&bytes).is_err(), "bit {bit} of byte {index}");
            bytes[index] ^= 1 << bit;
        }
    }
    bytes.push(b'\n');
    assert!(seal::decode(&bytes).is_err());
}

#[test]
fn files_cut_short_are_found_on_opening() {
    let root = tempfile::tempdir().unwrap();
    let dir = save_small(root.path(), 1);
    let path = dir.join("part-00001.1-1.safetensors");
    let sound = fs::read(&path).unwrap();
    for length in [0, 1, sound.len() / 2, sound.len() - 1] {
        fs::write(&path, &sound[..length]).unwrap();
        let error = Checkpoint::open(&dir).unwrap_err();
        assert!(matches!(error, Error::FileSize { .. }), "{error}");
        let text = error.to_string();
        assert!(
            text.contains("part-00001") && text.contains("cut short"),
            "{text}"
        );
    }
    fs::remove_file(&path).unwrap();
    let error = Checkpoint::open(&dir).unwrap_err().to_string();
    assert!(error.contains("part-00001.1-1.safetensors"), "{error}");

    fs::write(&path, &sound).unwrap();
    let manifest = fs::read(dir.join("manifest.json")).unwrap();
    for length in [0, 1, 50, manifest.len() / 2, manifest.len() - 1] {
        fs::write(dir.join("manifest.json"), &manifest[..length]).unwrap();
        let error = Checkpoint::open(&dir).unwrap_err();
        assert!(matches!(error, Error::ManifestDamaged { .. }), "{error}");
    }
}

#[test]
fn a_file_cut_short_after_opening_is_an_error_too() {
    let root = tempfile::tempdir().unwrap();
    let dir = save_small(root.path(), 1);
    let checkpoint = Checkpoint::open(&dir).unwrap();
    fs::write(dir.join("part-00000.1-1.safetensors"), b"short").unwrap();
    let mut out = [0.0; 2];
    let error = checkpoint
        .read("w", StateKind::Master, 0..2, &mut out)
        .unwrap_err();
    assert!(matches!(error, Error::FileSize { found: 5, .. }), "{error}");
}
