//! How much of a hostile input is believed.

/// Bounds on one layer, checked before memory is allocated or time is spent on the input's word.
///
/// The defaults accept what real writers produce with a wide margin. With them, opening a layer allocates at
/// most `toc_compressed_bytes` (only if the TOC arrives in two pieces) `+ toc_json_bytes +` about 2 KiB for
/// each of `entries`, and decoding a member at most the wanted bytes plus 128 KiB.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Bytes of the TOC member as stored in the blob. Default 64 MiB.
    pub toc_compressed_bytes: u64,
    /// Bytes of the TOC JSON. Default 256 MiB (writers need about 380 bytes per entry).
    pub toc_json_bytes: u64,
    /// Entries of the TOC, and separately names in the tree (implied parent directories count). Default 1,000,000.
    pub entries: u32,
    /// Bytes of one component of a name, of one xattr's name, and of a user's or group's name. Default 255
    /// (Linux `NAME_MAX`, `XATTR_NAME_MAX`).
    pub name_bytes: u64,
    /// Components of a name. Default 1024.
    pub path_depth: u32,
    /// Bytes of a symbolic link's target. Default 4095 (Linux `PATH_MAX` without its NUL).
    pub link_target_bytes: u64,
    /// Bytes of all xattr names and values of one inode. Default 256 KiB.
    pub xattr_bytes: u64,
    /// Bytes of one chunk, decompressed. Default 64 MiB (writers make 4 MiB unless told otherwise).
    pub chunk_bytes: u64,
    /// Bytes of one member, decompressed, up to the end of the last wanted chunk: what must be inflated to get
    /// at it. Default 256 MiB.
    pub member_bytes: u64,
    /// Hard links to go through from a name to its file. Default 64.
    pub link_depth: u32,
    /// Bytes of a tar-split's JSON, which is read line by line. Default 1 GiB (writers need about 1100 bytes per entry). As
    /// stored in the blob it may have `toc_compressed_bytes`.
    pub tar_split_bytes: u64,
    /// Bytes of one line of it. Default 4 MiB (writers cut what is long into segments of 1 MiB).
    pub tar_split_line_bytes: u64,
}

impl Default for Limits {
    fn default() -> Self {
        const MIB: u64 = 1 << 20;
        Limits {
            toc_compressed_bytes: 64 * MIB,
            toc_json_bytes: 256 * MIB,
            entries: 1_000_000,
            name_bytes: 255,
            path_depth: 1024,
            link_target_bytes: 4095,
            xattr_bytes: 256 << 10,
            chunk_bytes: 64 * MIB,
            member_bytes: 256 * MIB,
            link_depth: 64,
            tar_split_bytes: 1 << 30,
            tar_split_line_bytes: 4 * MIB,
        }
    }
}
