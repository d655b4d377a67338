//! Cluster files: what a plan cannot know from the config.

use std::path::Path;

use oxitron_trainer::config::{ConfigError, Device, Problem};
use serde::Deserialize;

use super::size;

/// The machines of a run. `configs/clusters/` has examples.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Cluster {
    /// What the output calls it.
    pub name: String,
    /// What ranks compute on, where the config leaves it open; in the file `"cpu"` or `"cuda"`.
    pub device: Device,
    /// Ranks that share a node.
    pub ranks_per_node: usize,
    /// Bytes that a rank can use, of a GPU where it computes on one; in the file a size such as
    /// `"80GiB"`.
    #[serde(deserialize_with = "memory")]
    pub memory: u64,
    /// Bytes per second that a rank sends to others of its node.
    pub bytes_per_second_in_node: f64,
    /// Bytes per second that a rank sends to other nodes while all ranks of its node do.
    pub bytes_per_second_between_nodes: f64,
}

fn memory<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<u64, D::Error> {
    let text = String::deserialize(deserializer)?;
    size::parse(&text).map_err(serde::de::Error::custom)
}

impl Cluster {
    /// Reads a cluster file.
    ///
    /// # Errors
    /// A file that cannot be read, an unknown or missing key, a value out of range.
    pub fn read(path: &Path) -> Result<Self, ConfigError> {
        let refused = |problem: String, help: &str| {
            ConfigError::from(Problem {
                message: format!("the cluster file {}: {problem}", path.display()),
                place: None,
                help: help.to_owned(),
            })
        };
        let text = std::fs::read_to_string(path)
            .map_err(|error| refused(error.to_string(), "name a TOML file that can be read"))?;
        let cluster: Self = toml::from_str(&text).map_err(|error| {
            let help = "all keys are name, device, ranks_per_node, memory, bytes_per_second_in_node \
                        and bytes_per_second_between_nodes; configs/clusters has examples";
            refused(error.to_string().trim_end().to_owned(), help)
        })?;
        if cluster.ranks_per_node == 0 {
            let help = "a node has at least one rank";
            return Err(refused("`ranks_per_node` is 0".to_owned(), help));
        }
        for (key, value) in [
            ("bytes_per_second_in_node", cluster.bytes_per_second_in_node),
            (
                "bytes_per_second_between_nodes",
                cluster.bytes_per_second_between_nodes,
            ),
        ] {
            if !(value.is_finite() && value > 0.0) {
                let help = "give the bytes per second that a rank can send, such as 50e9";
                return Err(refused(format!("`{key}` is {value}"), help));
            }
        }
        Ok(cluster)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    const TEXT: &str = "name = \"two\"\ndevice = \"cpu\"\nranks_per_node = 2\nmemory = \"4GiB\"\n\
                        bytes_per_second_in_node = 2e9\nbytes_per_second_between_nodes = 1e8\n";

    fn read(text: &str) -> Result<Cluster, String> {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), text).unwrap();
        Cluster::read(file.path()).map_err(|error| error.to_string())
    }

    #[test]
    fn every_key_is_required_and_no_other_is_taken() {
        let cluster = read(TEXT).unwrap();
        assert_eq!((cluster.ranks_per_node, cluster.memory), (2, 4 << 30));
        for (key, _) in TEXT.lines().map(|line| line.split_once(' ').unwrap()) {
            let without: String = TEXT
                .split_inclusive('\n')
                .filter(|line| !line.starts_with(key))
                .collect();
            let error = read(&without).unwrap_err();
            assert!(error.contains(&format!("missing field `{key}`")), "{error}");
        }
        for (change, says) in [
            ("switches = 1", "unknown field `switches`"),
            ("ranks_per_node = 0", "`ranks_per_node` is 0"),
            ("memory = \"4G\"", "`4G` is no size of memory"),
            ("device = \"gpu\"", "unknown variant `gpu`"),
            (
                "bytes_per_second_in_node = 0.0",
                "`bytes_per_second_in_node` is 0",
            ),
        ] {
            let key = change.split_once(' ').unwrap().0;
            let kept = TEXT
                .split_inclusive('\n')
                .filter(|line| !line.starts_with(key));
            let error = read(&format!("{}{change}\n", kept.collect::<String>())).unwrap_err();
            assert!(error.contains(says), "{error}");
        }
    }

    #[test]
    fn the_examples_can_be_read() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../configs/clusters");
        let mut files = 0;
        for entry in std::fs::read_dir(folder).unwrap() {
            Cluster::read(&entry.unwrap().path()).unwrap();
            files += 1;
        }
        assert!(files > 0);
    }
}
