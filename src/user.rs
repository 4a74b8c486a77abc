//! Who runs this program: root of the machine, or a user, who is root in a user namespace of his own at most.

/// Whether it is root of the machine.
pub fn is_root() -> bool {
    let map = std::fs::read_to_string("/proc/self/uid_map").unwrap_or_default();
    rustix::process::geteuid().is_root() && !is_mapped(&map)
}

/// Whether it is root in a user namespace only, as `podman unshare` has it.
pub fn is_unshared() -> bool {
    rustix::process::geteuid().is_root() && !is_root()
}

/// Whether a user namespace has other users than the machine: its map is not the one line that maps all to themselves.
fn is_mapped(map: &str) -> bool {
    let fields: Vec<&str> = map.split_whitespace().collect();
    !fields.is_empty() && fields != ["0", "0", "4294967295"]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn user_namespaces_are_told_by_their_map() {
        assert!(!is_mapped("         0          0 4294967295\n"));
        assert!(!is_mapped(""));
        assert!(is_mapped("         0       1000          1\n         1     100000      65536\n"));
    }
}
