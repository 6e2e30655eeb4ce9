//! The `unix` attestor.

/// Its settings, with SPIRE's names.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Settings {
    /// `discover_workload_path`: whether `unix:path` and `unix:sha256` are found out. Default false.
    pub discover_workload_path: bool,
    /// `workload_size_limit`: the largest executable to hash, in bytes; 0 for any, negative never to hash.
    pub workload_size_limit: i64,
}
