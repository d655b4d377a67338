//! Damage is detected, wherever it is.

use std::fs;

use super::*;

/// A small generator with a fixed seed, so that a failure can be looked at again.
struct Xorshift(u64);

impl Xorshift {
    fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % limit as u64) as usize
    }
}

#[test]
fn fifty_bit_flips_are_all_detected() {
    let root = tempfile::tempdir().unwrap();
    let dir = save_small(root.path(), 1);
    read_all(&dir).unwrap();
    let mut random = Xorshift(0x5EED);
    let files = names(&dir);
    for flip in 0..50 {
        // Every other flip hits the manifest.
        let name = if flip % 2 == 0 {
            "manifest.json"
        } else {
            &files[1 + random.below(files.len() - 1)]
        };
        let path = dir.join(name);
        let sound = fs::read(&path).unwrap();
        let mut bytes = sound.clone();
        let (byte, bit) = (random.below(bytes.len()), random.below(8));
        bytes[byte] ^= 1 << bit;
        fs::write(&path, bytes).unwrap();
        assert!(
            read_all(&dir).is_err(),
            "bit {bit} of byte {byte} of {name}"
        );
        fs::write(&path, sound).unwrap();
    }
    read_all(&dir).unwrap();
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
