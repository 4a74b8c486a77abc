//! Reads along what a client of HTTP/2 sends, for the calls of PullImage in it.
//!
//! Pure: is given the bytes as they come and answers nothing. Knows as much of HTTP/2 (RFC 9113) as it takes to follow header
//! blocks, which depend on all earlier ones, and the data of one kind of call. Memory is bounded whatever comes. A
//! connection that cannot be followed is an error once; what comes after it cannot be understood.

use std::collections::BTreeMap;

use anyhow::{Context as _, bail, ensure};
use loona_hpack::Decoder;
use prost::Message as _;
use proto::cri::{AuthConfig, PullImageRequest};
use registry::PullLogin;

/// What a client says first.
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// Length (3 bytes), type, flags, stream (4 bytes).
const FRAME_HEAD: usize = 9;
/// Length and flags of a gRPC message: compressed or not, and its size.
const MESSAGE_HEAD: usize = 5;
/// Both versions of the interface have the same messages.
const PULLS: [&[u8]; 2] =
    [b"/runtime.v1.ImageService/PullImage", b"/runtime.v1alpha2.ImageService/PullImage"];

/// No message of the interface may be longer; nor may a frame, or all calls that are not complete yet.
const MOST_BYTES: usize = 16 << 20;
/// A header block may have as many bytes: gRPC's implementations allow 16 KiB or less unless told otherwise.
const MOST_HEADERS: usize = 1 << 20;
/// The table that header blocks refer to: 4 KiB unless the server allows more, which containerd does not.
const MOST_TABLE: usize = 64 << 10;

/// Calls whose requests are not complete yet.
const MOST_PULLS: usize = 1000;

const DATA: u8 = 0;
const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
const CONTINUATION: u8 = 9;

const END_STREAM: u8 = 0x1;
const END_HEADERS: u8 = 0x4;
const PADDED: u8 = 0x8;
const PRIORITY: u8 = 0x20;

/// The same under the registry client's names.
pub(super) fn login(auth: AuthConfig) -> PullLogin {
    let AuthConfig { username, password, auth, server_address, identity_token, registry_token } = auth;
    PullLogin { username, password, auth, server_address, identity_token, registry_token }
}

/// One connection, from its first byte.
pub struct Observer {
    /// What is left of the preface.
    preface: &'static [u8],
    /// The beginning of a frame.
    rest: Vec<u8>,
    headers: Decoder<'static>,
    block: Option<Block>,
    /// What has come of the request of each call of PullImage, by stream.
    pulls: BTreeMap<u32, Vec<u8>>,
}

/// A header block that is not complete yet.
struct Block {
    stream: u32,
    flags: u8,
    bytes: Vec<u8>,
}

impl Observer {
    /// Nothing has been read yet.
    pub fn new() -> Self {
        let mut headers = Decoder::new();
        headers.set_max_allowed_table_size(MOST_TABLE);
        Self { preface: PREFACE, rest: Vec::new(), headers, block: None, pulls: BTreeMap::new() }
    }

    /// Takes the next bytes; `on_pull` is told of every request to pull with a login that is complete with them.
    ///
    /// # Errors
    ///
    /// This is not HTTP/2, or goes beyond a limit. The observer is of no more use.
    pub fn read(&mut self, bytes: &[u8], on_pull: &dyn Fn(&str, PullLogin)) -> anyhow::Result<()> {
        let start = bytes.len().min(self.preface.len());
        let (preface, bytes) = bytes.split_at(start);
        ensure!(self.preface.starts_with(preface), "it does not begin as HTTP/2 does");
        self.preface = &self.preface[start..];
        self.rest.extend_from_slice(bytes);
        let mut buffer = std::mem::take(&mut self.rest);
        let mut done = 0;
        while let Some((head, after)) = buffer[done..].split_first_chunk::<FRAME_HEAD>() {
            let [a, b, c, kind, flags, stream @ ..] = *head;
            let length = u32::from_be_bytes([0, a, b, c]) as usize;
            let Some(payload) = after.get(..length) else { break };
            // The first bit is reserved.
            let stream = u32::from_be_bytes(stream) & (u32::MAX >> 1);
            self.frame(kind, flags, stream, payload, on_pull)?;
            done += FRAME_HEAD + length;
        }
        buffer.drain(..done);
        self.rest = buffer;
        Ok(())
    }

    fn frame(
        &mut self,
        kind: u8,
        flags: u8,
        stream: u32,
        payload: &[u8],
        on_pull: &dyn Fn(&str, PullLogin),
    ) -> anyhow::Result<()> {
        match (kind, self.block.take()) {
            (CONTINUATION, Some(mut block)) if block.stream == stream => {
                block.bytes.extend_from_slice(payload);
                block.flags |= flags & END_HEADERS;
                self.block(block)
            }
            (CONTINUATION, None) | (_, Some(_)) => bail!("a header block is interrupted"),
            (HEADERS, None) => {
                let mut payload = unpadded(flags, payload)?;
                if flags & PRIORITY != 0 {
                    payload = payload.get(5..).context("a frame is too short")?;
                }
                self.block(Block { stream, flags, bytes: payload.to_vec() })
            }
            (DATA, None) => self.data(flags, stream, unpadded(flags, payload)?, on_pull),
            (RST_STREAM, None) => {
                self.pulls.remove(&stream);
                Ok(())
            }
            _ => Ok(()),
        }
    }

    fn block(&mut self, block: Block) -> anyhow::Result<()> {
        ensure!(block.bytes.len() <= MOST_HEADERS, "a header block is too long");
        if block.flags & END_HEADERS == 0 {
            self.block = Some(block);
            return Ok(());
        }
        let mut is_pull = false;
        self.headers.decode_with_cb(&block.bytes, |name, value| {
            is_pull |= *name == *b":path" && PULLS.contains(&&*value);
        })?;
        match (is_pull, block.flags & END_STREAM != 0) {
            (_, true) => drop(self.pulls.remove(&block.stream)),
            (true, false) => drop(self.pulls.insert(block.stream, Vec::new())),
            (false, false) => {}
        }
        // A call that the server has ended is not seen to end; the oldest is one.
        if self.pulls.len() > MOST_PULLS {
            self.pulls.pop_first();
        }
        Ok(())
    }

    fn data(
        &mut self,
        flags: u8,
        stream: u32,
        payload: &[u8],
        on_pull: &dyn Fn(&str, PullLogin),
    ) -> anyhow::Result<()> {
        let held: usize = self.pulls.values().map(Vec::len).sum();
        let Some(request) = self.pulls.get_mut(&stream) else { return Ok(()) };
        ensure!(held + payload.len() <= MOST_BYTES, "requests to pull are too long");
        request.extend_from_slice(payload);
        // containerd begins with the message's last byte; the stream may end later.
        let complete = message(request)?.map(pull).transpose()?;
        if complete.is_some() || flags & END_STREAM != 0 {
            self.pulls.remove(&stream);
        }
        if let Some((image, Some(login))) = complete {
            on_pull(&image, login);
        }
        Ok(())
    }
}

/// The content of a frame that may have been filled up.
fn unpadded(flags: u8, payload: &[u8]) -> anyhow::Result<&[u8]> {
    if flags & PADDED == 0 {
        return Ok(payload);
    }
    let (&padding, payload) = payload.split_first().context("a frame is too short")?;
    let length = payload.len().checked_sub(padding.into()).context("a frame is too short")?;
    Ok(&payload[..length])
}

/// The first message in the body of a call, if all of it is there.
fn message(body: &[u8]) -> anyhow::Result<Option<&[u8]>> {
    let Some(([compressed, length @ ..], after)) = body.split_first_chunk::<MESSAGE_HEAD>() else {
        return Ok(None);
    };
    ensure!(*compressed == 0, "requests are compressed");
    Ok(after.get(..u32::from_be_bytes(*length) as usize))
}

/// The image and the login of a request.
fn pull(message: &[u8]) -> anyhow::Result<(String, Option<PullLogin>)> {
    let PullImageRequest { image, auth } = PullImageRequest::decode(message)?;
    let login = auth.map(login).filter(|login| *login != PullLogin::default());
    Ok((image.unwrap_or_default().image, login))
}
