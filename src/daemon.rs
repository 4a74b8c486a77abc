//! The connection to the daemon's control socket.

use std::path::Path;

use anyhow::Context;
use proto::control::control_client::ControlClient;
use tonic::transport::Channel;

use crate::containerd::connect;
use crate::serve::control_address;

/// A client of the daemon whose socket for containerd is `address`.
///
/// # Errors
///
/// Nobody listens there.
pub async fn client(address: &Path) -> anyhow::Result<ControlClient<Channel>> {
    let address = control_address(address);
    let channel = connect(&address).await.with_context(|| {
        format!("cannot reach the daemon at {} (is it running? --address says where)", address.display())
    })?;
    Ok(ControlClient::new(channel))
}
