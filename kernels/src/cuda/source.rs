//! The texts of the kernels, as they are handed to a compiler at run time.

/// One `.cu` file.
#[derive(Debug)]
pub(crate) struct Source {
    /// Its name, without the ending.
    pub(crate) name: &'static str,
    /// Its text.
    pub(crate) text: &'static str,
}

// Told apart by their names: a launch looks its kernel up, and should not walk through the text.
impl PartialEq for Source {
    fn eq(&self, other: &Source) -> bool {
        self.name == other.name
    }
}
impl Eq for Source {}
impl std::hash::Hash for Source {
    fn hash<H: std::hash::Hasher>(&self, state: &mut H) {
        self.name.hash(state);
    }
}

/// Declares the files of this folder.
macro_rules! sources {
    ($($constant:ident = $name:literal),+ $(,)?) => {
        $(pub(crate) const $constant: Source = Source {
            name: $name,
            text: include_str!(concat!($name, ".cu")),
        };)+
        /// All of them.
        pub(crate) const ALL: &[Source] = &[$($constant),+];
    };
}

sources! {
    ADAMW = "adamw",
    CAST = "cast",
    CONTROL = "control",
    CROSS_ENTROPY = "cross_entropy",
    EMBEDDING = "embedding",
    GLU = "glu",
    NORM = "norm",
    RMS_NORM = "rms_norm",
    ROPE = "rope",
}

/// What the files include: name and text.
pub(crate) const HEADERS: [(&str, &str); 3] = [
    ("common.cuh", include_str!("common.cuh")),
    ("decision.cuh", include_str!("decision.cuh")),
    ("packed.cuh", include_str!("packed.cuh")),
];

/// A kernel of a file, named by what it does and the dtypes it does it for:
/// `rms_norm_forward` for `f32` and `bf16` is `rms_norm_forward_f32_bf16`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Kernel {
    pub(crate) source: &'static Source,
    pub(crate) function: &'static str,
    pub(crate) dtypes: [&'static str; 2],
}

impl Kernel {
    /// A kernel that exists for fixed dtypes alone.
    pub(crate) const fn new(source: &'static Source, function: &'static str) -> Self {
        Self {
            source,
            function,
            dtypes: [""; 2],
        }
    }

    /// Its variant for dtypes as [`float`](super::float) names them; an empty one is left out.
    pub(crate) const fn of(self, dtypes: [&'static str; 2]) -> Self {
        Self { dtypes, ..self }
    }

    /// Its name in the compiled file.
    pub(crate) fn symbol(&self) -> String {
        let mut symbol = self.function.to_owned();
        for dtype in self.dtypes.iter().filter(|dtype| !dtype.is_empty()) {
            symbol.push('_');
            symbol.push_str(dtype);
        }
        symbol
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn symbols_name_the_dtypes() {
        let kernel = Kernel::new(&RMS_NORM, "rms_norm_forward");
        assert_eq!(kernel.symbol(), "rms_norm_forward");
        assert_eq!(kernel.of(["f32", ""]).symbol(), "rms_norm_forward_f32");
        assert_eq!(
            kernel.of(["f32", "bf16"]).symbol(),
            "rms_norm_forward_f32_bf16"
        );
    }

    #[test]
    fn files_include_only_what_is_handed_over() {
        for source in ALL {
            for line in source
                .text
                .lines()
                .filter(|line| line.starts_with("#include"))
            {
                let known = HEADERS
                    .iter()
                    .any(|(name, _)| line.contains(&format!("\"{name}\"")));
                assert!(known, "{}.cu: {line}", source.name);
            }
        }
    }
}
