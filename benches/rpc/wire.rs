//! One HTTP/2 connection of a client that costs next to nothing: bytes in, bytes out, no sockets and no clock.
//!
//! Messages are encoded by who calls, headers once for each connection (the second call names the entries of the table that the first one made,
//! RFC 7541). Answers are looked at as far as the bench wants to know: whether a token was valid, and how many there were. What happens in no
//! sane exchange ends the bench.

use std::collections::HashMap;

pub const VALIDATE: &str = "/keyward.v1.ValidationService/ValidateToken";
pub const CHECK: &str = "/envoy.service.auth.v3.Authorization/Check";
pub const BATCH: &str = "/keyward.v1.ValidationService/BatchValidateTokens";
pub const STREAM: &str = "/keyward.v1.ValidationService/StreamValidateTokens";
pub const CREATE: &str = "/keyward.v1.TokenService/CreateToken";

/// The largest frame that everybody takes (RFC 9113, section 4.2), which is also as much as one call may send at once here.
pub const FRAME_MAX: usize = 16_384;
const WINDOW_FIRST: i64 = 65_535;
const WINDOW_MAX: u32 = (1 << 31) - 1;
/// Bytes that are received before the server is told that there is room for more.
const ROOM_TOLD_AFTER: u32 = 1 << 24;

const DATA: u8 = 0;
const HEADERS: u8 = 1;
const RESET: u8 = 3;
const SETTINGS: u8 = 4;
const PING: u8 = 6;
const GO_AWAY: u8 = 7;
const WINDOW_UPDATE: u8 = 8;
const END_STREAM: u8 = 1;
const ACK: u8 = 1;
const END_HEADERS: u8 = 4;
const PADDED: u8 = 8;

/// A message as gRPC sends it: not compressed, its length, itself.
pub fn framed(message: &[u8]) -> Vec<u8> {
    let length = u32::try_from(message.len()).expect("small");
    [&[0], length.to_be_bytes().as_slice(), message].concat()
}

/// Takes a whole message out of the front of what was received.
pub fn unframed(received: &[u8]) -> Option<(&[u8], &[u8])> {
    let (head, rest) = received.split_first_chunk::<5>()?;
    let length = u32::from_be_bytes([head[1], head[2], head[3], head[4]]) as usize;
    rest.split_at_checked(length)
}

/// Whether a `ValidateTokenResponse` says `valid`, which is its first field.
pub fn says_valid(message: &[u8]) -> bool {
    message.starts_with(&[0x08, 1])
}

/// How many entries of field 1 there are, and how many of them say `valid`: a `BatchValidateTokensResponse`, or one answer of the stream.
pub fn count_valid(mut message: &[u8]) -> (u64, u64) {
    let (mut entries, mut valid) = (0, 0);
    while let Some((0x0a, rest)) = message.split_first() {
        let (length, rest) = varint(rest);
        let (entry, rest) = rest.split_at(length);
        entries += 1;
        valid += u64::from(says_valid(entry));
        message = rest;
    }
    (entries, valid)
}

fn varint(bytes: &[u8]) -> (usize, &[u8]) {
    let length = bytes.iter().position(|byte| byte & 0x80 == 0).expect("a whole number") + 1;
    let number = bytes[..length].iter().rev().fold(0, |number, byte| number << 7 | usize::from(byte & 0x7f));
    (number, &bytes[length..])
}

/// One call under way.
struct Stream {
    tag: u64,
    received: Vec<u8>,
    window: i64,
}

/// A connection, seen from the client.
pub struct Line {
    first_block: Vec<u8>,
    next_stream: u32,
    streams: HashMap<u32, Stream>,
    streams_max: usize,
    /// What may be sent, on the connection and on a new stream.
    window: i64,
    stream_window: i64,
    received: u32,
    is_greeted: bool,
    is_closing: bool,
    input: Vec<u8>,
    /// What has to be sent.
    pub output: Vec<u8>,
}

impl Line {
    /// For calls of one method, made by one caller.
    pub fn new(path: &str, caller: &str) -> Self {
        let mut line = Self {
            first_block: header_block(path, caller),
            next_stream: 1,
            streams: HashMap::new(),
            streams_max: 100,
            window: WINDOW_FIRST,
            stream_window: WINDOW_FIRST,
            received: 0,
            is_greeted: false,
            is_closing: false,
            input: Vec::new(),
            output: b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec(),
        };
        // No pushes, and as much room for answers as there can be.
        let settings = [&[0, 2, 0, 0, 0, 0, 0, 4], WINDOW_MAX.to_be_bytes().as_slice()].concat();
        line.frame(SETTINGS, 0, 0, &settings);
        line.frame(WINDOW_UPDATE, 0, 0, &(WINDOW_MAX - 65_535).to_be_bytes());
        line
    }

    /// Whether the server has said what it takes.
    pub fn is_greeted(&self) -> bool {
        self.is_greeted
    }

    /// Whether the server wants no more calls on this connection.
    pub fn is_closing(&self) -> bool {
        self.is_closing
    }

    /// Calls under way.
    pub fn under_way(&self) -> usize {
        self.streams.len()
    }

    /// Whether a call can be made now, with a message of up to [`FRAME_MAX`].
    pub fn has_room(&self) -> bool {
        let window = self.window.min(self.stream_window);
        self.is_greeted && !self.is_closing && self.streams.len() < self.streams_max && window >= FRAME_MAX as i64
    }

    /// Makes a call with one message. Whoever calls has asked [`Line::has_room`].
    pub fn call(&mut self, tag: u64, message: &[u8]) {
        let id = self.open(tag);
        self.send(id, message, true);
    }

    /// Begins a call; returns its stream.
    pub fn open(&mut self, tag: u64) -> u32 {
        let id = self.next_stream;
        // Static entries for POST and http, then the five that the first call has put into the table.
        let again = [0x83, 0x86, 0xc2, 0xc1, 0xc0, 0xbf, 0xbe];
        let block = if id == 1 { std::mem::take(&mut self.first_block) } else { again.to_vec() };
        self.frame(HEADERS, END_HEADERS, id, &block);
        self.next_stream += 2;
        self.streams.insert(id, Stream { tag, received: Vec::new(), window: self.stream_window });
        id
    }

    /// How much can be sent on a stream now.
    pub fn room_of(&self, id: u32) -> usize {
        let stream = self.streams.get(&id).map_or(0, |stream| stream.window);
        usize::try_from(self.window.min(stream)).unwrap_or(0).min(FRAME_MAX)
    }

    pub fn send(&mut self, id: u32, bytes: &[u8], is_last: bool) {
        assert!(bytes.len() <= FRAME_MAX, "a message of {} bytes", bytes.len());
        self.frame(DATA, if is_last { END_STREAM } else { 0 }, id, bytes);
        self.window -= bytes.len() as i64;
        if let Some(stream) = self.streams.get_mut(&id) {
            stream.window -= bytes.len() as i64;
        }
    }

    fn frame(&mut self, kind: u8, flags: u8, stream: u32, payload: &[u8]) {
        let length = u32::try_from(payload.len()).expect("small").to_be_bytes();
        self.output.extend_from_slice(&[length[1], length[2], length[3], kind, flags]);
        self.output.extend_from_slice(&stream.to_be_bytes());
        self.output.extend_from_slice(payload);
    }

    /// Takes what the server has sent. `on` gets the call's tag, what has come of its answer and is not taken yet, and whether it has ended.
    pub fn receive(&mut self, bytes: &[u8], mut on: impl FnMut(u64, &mut Vec<u8>, bool)) {
        self.input.extend_from_slice(bytes);
        let input = std::mem::take(&mut self.input);
        let mut rest = input.as_slice();
        while let Some((head, after)) = rest.split_first_chunk::<9>() {
            let length = u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize;
            let Some((payload, after)) = after.split_at_checked(length) else { break };
            let stream = u32::from_be_bytes([head[5] & 0x7f, head[6], head[7], head[8]]);
            self.take(head[3], head[4], stream, payload, &mut on);
            rest = after;
        }
        self.input = rest.to_vec();
    }

    fn take(&mut self, kind: u8, flags: u8, id: u32, payload: &[u8], on: &mut impl FnMut(u64, &mut Vec<u8>, bool)) {
        match kind {
            DATA | HEADERS => {
                assert!(flags & PADDED == 0, "padding is not understood here");
                let stream = self.streams.get_mut(&id).expect("a call of ours");
                if kind == DATA {
                    stream.received.extend_from_slice(payload);
                }
                let has_ended = flags & END_STREAM != 0;
                if kind == DATA || has_ended {
                    on(stream.tag, &mut stream.received, has_ended);
                }
                if has_ended {
                    self.streams.remove(&id);
                }
                // Only data takes room (RFC 9113, section 5.2.1).
                self.tell_room(if kind == DATA { payload.len() } else { 0 });
            }
            SETTINGS if flags & ACK == 0 => self.greet(payload),
            PING if flags & ACK == 0 => self.frame(PING, ACK, 0, payload),
            WINDOW_UPDATE => {
                let more = i64::from(number(payload));
                match self.streams.get_mut(&id) {
                    Some(stream) => stream.window += more,
                    None if id == 0 => self.window += more,
                    None => {}
                }
            }
            GO_AWAY => {
                assert_eq!(number(&payload[4..]), 0, "the server closes the connection: {}", String::from_utf8_lossy(&payload[8..]));
                self.is_closing = true;
            }
            RESET => panic!("the server has reset a call: error {}", number(payload)),
            _ => {}
        }
    }

    fn greet(&mut self, settings: &[u8]) {
        for setting in settings.chunks_exact(6) {
            let value = number(&setting[2..]);
            match setting[1] {
                3 => self.streams_max = value as usize,
                4 => {
                    let more = i64::from(value) - self.stream_window;
                    self.stream_window += more;
                    self.streams.values_mut().for_each(|stream| stream.window += more);
                }
                _ => {}
            }
        }
        self.is_greeted = true;
        self.frame(SETTINGS, ACK, 0, &[]);
    }

    fn tell_room(&mut self, bytes: usize) {
        self.received += u32::try_from(bytes).expect("small");
        if self.received > ROOM_TOLD_AFTER {
            let received = std::mem::take(&mut self.received);
            self.frame(WINDOW_UPDATE, 0, 0, &received.to_be_bytes());
        }
    }
}

fn number(bytes: &[u8]) -> u32 {
    bytes.first_chunk::<4>().map(|bytes| u32::from_be_bytes(*bytes)).expect("four bytes")
}

/// The headers of the first call: each that is not in the static table makes an entry of the dynamic one.
fn header_block(path: &str, caller: &str) -> Vec<u8> {
    let mut block = vec![0x83, 0x86];
    let text = |block: &mut Vec<u8>, text: &str| {
        // Seven bits hold the length of a text that is not Huffman-coded.
        block.push(u8::try_from(text.len()).ok().filter(|length| *length < 127).expect("short"));
        block.extend_from_slice(text.as_bytes());
    };
    let authorization = format!("Bearer {caller}");
    // Numbers of names in the static table.
    for (name, value) in [(0x04, path), (0x01, "localhost"), (0x1f, "application/grpc")] {
        block.push(0x40 | name);
        text(&mut block, value);
    }
    block.push(0x40);
    text(&mut block, "te");
    text(&mut block, "trailers");
    block.push(0x40 | 0x17);
    text(&mut block, &authorization);
    block
}
