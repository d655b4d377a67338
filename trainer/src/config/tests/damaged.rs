//! Whatever stands in a config or behind `--set`, the answer is a message.

use proptest::prelude::*;

use super::{MINIMAL, load, load_with};
use crate::config::Config;

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn arbitrary_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("run.toml");
        std::fs::write(&path, &bytes).unwrap();
        // Nothing so short is a whole config.
        let error = Config::load(&path, &[]).unwrap_err();
        prop_assert!(!error.to_string().is_empty());
    }

    #[test]
    fn a_damaged_config_never_panics(
        at in 0..MINIMAL.len(),
        length in 0..40usize,
        junk in "[\\PC\\n\\[\\]=\"{}.#]{0,12}",
    ) {
        let end = (at + length).min(MINIMAL.len());
        let text = format!("{}{junk}{}", &MINIMAL[..at], &MINIMAL[end..]);
        if let Err(error) = load(&text) {
            prop_assert!(!error.to_string().is_empty());
        }
    }

    #[test]
    fn an_arbitrary_set_never_panics(set in "(stage|data|run|model)?(\\.(0|1|source|name|x))*(=)?\\PC{0,20}") {
        if let Err(error) = load_with(MINIMAL, &[&set]) {
            prop_assert!(!error.to_string().is_empty());
        }
    }
}
