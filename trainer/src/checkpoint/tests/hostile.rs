//! Manifests with a right checksum and wrong content.

use std::fs;

use xxhash_rust::xxh3::xxh3_128;

use super::*;

/// A checkpoint whose manifest was changed and sealed again.
fn open_changed(change: impl FnOnce(&mut Manifest)) -> Error {
    let root = tempfile::tempdir().unwrap();
    let dir = save_small(root.path(), 1);
    let path = dir.join("manifest.json");
    let mut manifest = seal::decode(&fs::read(&path).unwrap()).unwrap();
    change(&mut manifest);
    fs::write(&path, seal::encode(&manifest).unwrap()).unwrap();
    Checkpoint::open(&dir).unwrap_err()
}

/// A checkpoint whose manifest is any text, with a right seal.
fn open_text(change: impl FnOnce(String) -> String) -> Error {
    let root = tempfile::tempdir().unwrap();
    let dir = save_small(root.path(), 1);
    let path = dir.join("manifest.json");
    let text = fs::read_to_string(&path).unwrap();
    let body = change(text[..text.rfind(",\n  \"checksum\"").unwrap()].to_owned());
    let checksum = xxh3_128(body.as_bytes());
    fs::write(
        &path,
        format!("{body},\n  \"checksum\": \"{checksum:032x}\"\n}}\n"),
    )
    .unwrap();
    Checkpoint::open(&dir).unwrap_err()
}

fn piece(manifest: &mut Manifest) -> &mut Piece {
    &mut manifest.tensors[0].states[0].pieces[0]
}

#[test]
fn inconsistent_manifests_are_refused_by_name() {
    type Change = fn(&mut Manifest);
    let changes: [(&str, Change); 24] = [
        ("not a plain name", |m| {
            m.files[0].name = "../other.safetensors".into()
        }),
        ("not a plain name", |m| {
            m.files[0].name = "/etc/passwd".into()
        }),
        ("not a plain name", |m| m.files[0].name = "a/b".into()),
        ("not a plain name", |m| m.files[0].name = "..".into()),
        ("not a plain name", |m| m.files[0].name = String::new()),
        ("not a plain name", |m| {
            m.files[0].name = "manifest.json".into()
        }),
        ("not a plain name", |m| m.files[0].name = "a\0b".into()),
        ("listed twice", |m| {
            m.files[1].name = m.files[0].name.clone()
        }),
        ("chunks of 0 bytes", |m| m.files[0].chunk_bytes = 0),
        ("chunks of 16777217 bytes", |m| {
            m.files[0].chunk_bytes = (16 << 20) + 1
        }),
        ("checksums for", |m| m.files[0].bytes = u64::MAX),
        ("checksums for", |m| m.files[0].chunks.clear()),
        ("leaves file", |m| piece(m).offset = u64::MAX),
        ("leaves file", |m| piece(m).offset = m.files[0].bytes - 1),
        ("not a payload file", |m| piece(m).file = 7),
        ("not a payload file", |m| {
            m.files[0].kind = FileKind::Attachment
        }),
        ("share bytes", |m| piece(m).offset += 4),
        ("no element or too many", |m| {
            m.tensors[0].shape = vec![usize::MAX, usize::MAX]
        }),
        ("no element or too many", |m| m.tensors[0].shape = vec![0]),
        ("dimensions, at most 8", |m| m.tensors[0].shape = vec![1; 9]),
        ("does not lie in shape", |m| {
            piece(m).region.start = vec![usize::MAX, 0]
        }),
        ("are in no piece", |m| {
            m.tensors[0].states[0].pieces.pop();
        }),
        ("are in two pieces", |m| {
            let twin = m.tensors[0].states[0].pieces[0].clone();
            m.tensors[0].states[0].pieces.push(twin);
        }),
        ("listed twice", |m| {
            let twin = m.tensors[0].clone();
            m.tensors.push(twin);
        }),
    ];
    for (message, change) in changes {
        let error = open_changed(change);
        assert!(
            matches!(error, Error::ManifestInvalid { .. }),
            "{message}: {error}"
        );
        assert!(error.to_string().contains(message), "{message}: {error}");
    }
}

#[test]
fn absurd_json_is_refused() {
    let invalid: [fn(String) -> String; 9] = [
        |_| "[".repeat(100_000),
        |_| "{\"format\": \"oxitron-checkpoint\"".to_owned(),
        |text| text.replace("\"bytes\": ", "\"bytes\": -"),
        |text| text.replace("\"bytes\": ", "\"bytes\": 1e300, \"x\": "),
        |text| text.replace("\"shape\": [6, 5]", "\"shape\": [6.5, 5]"),
        |text| {
            text.replace(
                "\"shape\": [6, 5]",
                "\"shape\": [99999999999999999999999, 5]",
            )
        },
        |text| text.replace("\"master\"", "\"slave\""),
        |text| text.replace("\"F32\"", "\"F64\""),
        |text| text.replace("\"save_id\"", "\"surprise\": 1,\n  \"save_id\""),
    ];
    for change in invalid {
        let error = open_text(change);
        assert!(matches!(error, Error::ManifestInvalid { .. }), "{error}");
    }
    let error = open_text(|text| text.replace("oxitron-checkpoint", "other-checkpoint"));
    assert!(error.to_string().contains("`other-checkpoint`"), "{error}");
    // The rest of a later version need not be understood to say so.
    let error = open_text(|text| {
        text.replace(
            "\"format_version\": 2",
            "\"format_version\": 3, \"novelty\": []",
        )
    });
    assert!(
        matches!(
            error,
            Error::Version {
                found: 3,
                known: 2,
                ..
            }
        ),
        "{error}"
    );
}

#[test]
fn oversized_manifests_are_not_read() {
    let root = tempfile::tempdir().unwrap();
    let dir = save_small(root.path(), 1);
    let file = fs::File::create(dir.join("manifest.json")).unwrap();
    // A hole: it takes no space, and reading it would.
    file.set_len(1 << 40).unwrap();
    let began = std::time::Instant::now();
    let error = Checkpoint::open(&dir).unwrap_err().to_string();
    assert!(error.contains("larger than"), "{error}");
    assert!(began.elapsed() < Duration::from_secs(5));
}

/// Many strided pieces cannot make opening take for ever.
#[test]
fn too_many_strided_pieces_are_refused() {
    let error = open_changed(|manifest| {
        let bytes = manifest.files[0].bytes;
        manifest.tensors[0].shape = vec![2, 5000];
        manifest.tensors[0].states.truncate(1);
        manifest.tensors[0].states[0].pieces = (0..5000)
            .map(|column| Piece {
                region: Region {
                    start: vec![0, column],
                    extent: vec![2, 1],
                    range: [0, 2],
                },
                file: 0,
                offset: bytes - 8,
            })
            .collect();
    });
    assert!(
        error
            .to_string()
            .contains("5000 pieces, some of them strided"),
        "{error}"
    );
}
