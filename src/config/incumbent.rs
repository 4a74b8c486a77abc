//! The keys of stargz-snapshotter's file that Lazurite takes without effect, or refuses.
//!
//! A user's existing file must load, and must not load with a silent change of meaning: each key here is named with
//! the reason when it is met. The tables are also printed in the reference page.

/// Keys that are accepted and have no effect, each with what Lazurite does instead.
///
/// A value that asks for nothing (`false` or an empty string) is passed over in silence.
pub const IGNORED: &[(&str, &str)] = &[
    ("http_cache_type", "compressed bytes are not kept; only verified file contents are stored"),
    ("filesystem_cache_type", "file contents are always stored on disk, once per layer"),
    ("resolve_result_entry_ttl_sec", "a layer stays known as long as a snapshot refers to it"),
    ("resolve_result_entry", "a layer stays known as long as a snapshot refers to it"),
    ("prefetch_timeout_sec", "starting a container never waits for prefetching"),
    ("prefetch_async_size", "prefetching is always in the background"),
    ("metadata_store", "a layer's index is one mapped file on disk, neither heap memory nor a database"),
    ("debug", "file system requests are not logged; log.level = \"debug\" shows requests to registries"),
    ("log_file_access", "not yet"),
    ("no_prometheus", "there is no metrics listener to switch off yet"),
    ("metrics_address", "not yet"),
    ("debug_address", "not yet"),
    ("registry.mirrors", "mirrors are set in hosts.toml files (registry.config_path) or under resolver.host"),
    (
        "registry.configs",
        "certificates are set in hosts.toml files (registry.config_path); for logins see kubelet_plugins and the tables after it",
    ),
    ("ipfs", "layers come from registries only"),
    ("blob.valid_interval", "mounting never asks the registry, so there is nothing to revalidate"),
    ("blob.check_always", "mounting never asks the registry, so there is nothing to revalidate"),
    ("blob.chunk_size", "ranges follow the layer's own chunks, merged where that saves requests"),
    ("blob.force_single_range_mode", "a request always asks for one range"),
    ("blob.prefetch_chunk_size", "prefetching is split and sent in parallel by itself"),
    ("directory_cache.max_lru_cache_entry", "the kernel's page cache is the only memory cache"),
    ("directory_cache.max_cache_fds", "the kernel's page cache is the only memory cache"),
    ("directory_cache.sync_add", "a chunk is recorded as present only when it is on disk"),
    ("directory_cache.direct", "the kernel's page cache is the only memory cache"),
    ("directory_cache.fadv_dontneed", "the kernel's page cache is the only memory cache"),
    ("fuse.attr_timeout", "layers never change, so the kernel may keep attributes for ever"),
    ("fuse.entry_timeout", "layers never change, so the kernel may keep names for ever"),
    ("fuse.passthrough", "a complete layer becomes a plain directory, which no file system daemon serves"),
    ("fuse.merge_buffer_size", "a file's contents are stored in one piece, so nothing is merged"),
    ("fuse.merge_worker_count", "a file's contents are stored in one piece, so nothing is merged"),
    (
        "snapshotter.allow_invalid_mounts_on_restart",
        "a layer that cannot be restored never keeps the daemon from starting",
    ),
    (
        "fuse_manager.enable",
        "not yet: containers that were started on a layer still lazy need the daemon they were started with",
    ),
    ("fuse_manager.address", "not yet"),
    ("fuse_manager.path", "not yet"),
    ("fuse_manager.metrics_address", "not yet"),
];

/// Switches that stop the start when they are on, each with the reason.
pub const REFUSED: &[(&str, &str)] = &[
    (
        "disable_verification",
        "Lazurite serves only bytes that match the digests of the image; there is no way to switch that off. \
         Remove the key. Layers without digests are unpacked by containerd instead of being mounted",
    ),
    (
        "allow_no_verification",
        "Lazurite serves only bytes that match the digests of the image, whatever labels ask for. Remove the key. \
         Layers without digests are unpacked by containerd instead of being mounted",
    ),
];
