//! Folders that are damaged or lie.

use super::*;

/// A sound folder.
fn folder(dir: &Path) {
    write_folder(
        dir,
        &legacy_config(false),
        &tensors(&sizes(false), FileDtype::BF16),
    );
}

fn open(dir: &Path) -> String {
    HfFolder::open(dir).unwrap_err().to_string()
}

/// Writes a safetensors file with any header over `data` zero bytes.
fn write_header(path: &Path, header: &str, data: usize) {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(header.as_bytes());
    bytes.resize(bytes.len() + data, 0);
    fs::write(path, bytes).unwrap();
}

#[test]
fn folders_that_are_none_are_told_apart() {
    let root = tempfile::tempdir().unwrap();
    assert!(open(&root.path().join("absent")).contains("no config.json"));
    folder(root.path());
    fs::remove_file(root.path().join("model.safetensors")).unwrap();
    fs::write(root.path().join("pytorch_model.bin"), b"").unwrap();
    assert!(open(root.path()).contains("pytorch_model.bin must be saved as safetensors"));
    fs::write(root.path().join("config.json"), b"{").unwrap();
    assert!(open(root.path()).contains("config.json: EOF"));
}

#[test]
fn files_cut_short_are_refused() {
    let root = tempfile::tempdir().unwrap();
    folder(root.path());
    let path = root.path().join("model.safetensors");
    let sound = fs::read(&path).unwrap();
    for length in [0, 7, 8, 100, sound.len() - 200, sound.len() - 1] {
        fs::write(&path, &sound[..length]).unwrap();
        let error = open(root.path());
        assert!(error.contains("model.safetensors: "), "{length}: {error}");
        assert!(
            error.contains("copy or download the file again"),
            "{length}: {error}"
        );
    }
    let mut longer = sound.clone();
    longer.extend_from_slice(&[0; 16]);
    fs::write(&path, longer).unwrap();
    assert!(open(root.path()).contains("data bytes"));
}

#[test]
fn header_lengths_that_lie_are_refused() {
    let root = tempfile::tempdir().unwrap();
    folder(root.path());
    let path = root.path().join("model.safetensors");
    let sound = fs::read(&path).unwrap();
    let stated = u64::from_le_bytes(sound[..8].try_into().unwrap());
    for length in [0, 1, stated - 8, stated + 8, 1 << 25, 1 << 40, u64::MAX] {
        let mut bytes = sound.clone();
        bytes[..8].copy_from_slice(&length.to_le_bytes());
        fs::write(&path, bytes).unwrap();
        let error = open(root.path());
        assert!(error.contains("header"), "{length}: {error}");
    }
}

#[test]
fn headers_that_lie_are_refused() {
    let root = tempfile::tempdir().unwrap();
    folder(root.path());
    let path = root.path().join("model.safetensors");
    let entry = |dtype: &str, shape: &str, offsets: &str| {
        format!(r#"{{"a":{{"dtype":"{dtype}","shape":{shape},"data_offsets":{offsets}}}}}"#)
    };
    let two = |second: &str| {
        format!(
            r#"{{"a":{{"dtype":"F32","shape":[2],"data_offsets":[0,8]}},"b":{{"dtype":"F32","shape":[2],"data_offsets":{second}}}}}"#
        )
    };
    for (header, message) in [
        (
            entry("F32", "[2]", "[0,16]"),
            "do not hold F32 of shape [2]",
        ),
        (entry("F32", "[4]", "[16,0]"), "do not hold"),
        (
            entry("F32", "[4611686018427387904,4]", "[0,16]"),
            "do not hold",
        ),
        (entry("F33", "[4]", "[0,16]"), "unknown element type F33"),
        (entry("F32", "[8]", "[0,32]"), "cut short"),
        (entry("F32", "[2]", "[0,8]"), "the file has 16 data bytes"),
        (entry("F32", "[2]", "[8,16]"), "overlap or leave a gap"),
        (entry("F32", "[-2]", "[0,8]"), "tensor `a`"),
        (entry("F32", "4", "[0,16]"), "tensor `a`"),
        (two("[4,12]"), "overlap or leave a gap"),
        (two("[0,8]"), "overlap or leave a gap"),
        ("[]".to_owned(), "header is not readable"),
        ("[".repeat(10_000), "header is not readable"),
        ("\u{0}".to_owned(), "header is not readable"),
    ] {
        write_header(&path, &header, 16);
        let error = open(root.path());
        assert!(error.contains(message), "{header:.60}: {error}");
    }
}

#[test]
fn indices_that_lie_are_refused() {
    let root = tempfile::tempdir().unwrap();
    let dir = root.path();
    folder(dir);
    let all = tensors(&sizes(false), FileDtype::BF16);
    fs::remove_file(dir.join("model.safetensors")).unwrap();
    write_file(&dir.join("one.safetensors"), &all[..3]);
    write_file(&dir.join("two.safetensors"), &all[3..]);
    let sound: HashMap<String, String> = all
        .iter()
        .enumerate()
        .map(|(index, tensor)| {
            let file = if index < 3 {
                "one.safetensors"
            } else {
                "two.safetensors"
            };
            (tensor.name.clone(), file.to_owned())
        })
        .collect();
    let write = |map: &HashMap<String, String>| {
        let index = json!({"metadata": {"total_size": 0}, "weight_map": map});
        fs::write(dir.join("model.safetensors.index.json"), index.to_string()).unwrap();
    };
    write(&sound);
    HfFolder::open(dir).unwrap();

    let change = |file: &str| {
        let mut map = sound.clone();
        map.insert(all[0].name.clone(), file.to_owned());
        write(&map);
        open(dir)
    };
    for outside in [
        "../one.safetensors",
        "/dev/zero",
        "",
        "a/../one.safetensors",
    ] {
        assert!(
            change(outside).contains("is not a plain file name"),
            "{outside}"
        );
    }
    assert!(change("three.safetensors").contains("three.safetensors"));
    assert!(change("two.safetensors").contains("is not in `two.safetensors`"));
    let mut map = sound.clone();
    map.remove(&all[0].name);
    write(&map);
    assert!(open(dir).contains("is not listed"));
    fs::write(
        dir.join("model.safetensors.index.json"),
        b"{\"weight_map\": 3}",
    )
    .unwrap();
    assert!(open(dir).contains("not an index"));
}
