//! Model presets: the files of `configs/models/`, inside the binary.

/// A model by name.
#[derive(Debug, Clone, Copy)]
pub struct Preset {
    /// What `[model] preset` calls it; the file's name without `.toml`.
    pub name: &'static str,
    /// The file: one `[model]` section.
    pub text: &'static str,
}

macro_rules! presets {
    ($($name:literal),* $(,)?) => {
        &[$(Preset {
            name: $name,
            text: include_str!(concat!("../../../configs/models/", $name, ".toml")),
        }),*]
    };
}

/// Every preset, smallest first.
pub const PRESETS: &[Preset] = presets![
    "tiny",
    "demo",
    "internlm2-1.8b",
    "llama-7b",
    "internlm2-7b",
    "internlm2-20b"
];

/// The preset of this name.
pub(super) fn find(name: &str) -> Option<&'static Preset> {
    PRESETS.iter().find(|preset| preset.name == name)
}
