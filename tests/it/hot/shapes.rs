//! Random requests about the tokens of a cast, good and broken in every way that the wire allows, each with a description that holds no secret.

mod checks;

use std::fmt::Write as _;

use crate::crash::Random;

/// One and the same token made three times: one for each way, so that their uses can be compared, and one for requests that are broken in ways
/// where it matters which letters a secret has.
pub struct Twins {
    pub name: &'static str,
    pub ids: [String; 3],
    pub secrets: [String; 3],
}

/// Which of them is for both ways.
pub const SHARED: usize = 2;

/// Everybody there is to ask, and to ask about.
pub struct Cast {
    pub callers: Vec<Twins>,
    pub tokens: Vec<Twins>,
}

/// A request, as it goes over the wire.
pub struct Sent {
    pub path: &'static str,
    pub method: &'static str,
    pub headers: Vec<(&'static str, Vec<u8>)>,
    /// The body, in the pieces that become DATA frames, and whether there is a pause before each.
    pub pieces: Vec<(Vec<u8>, bool)>,
    pub trailers: bool,
    /// What it is.
    pub shape: String,
}

const VALIDATE: &str = "/keyward.v1.ValidationService/ValidateToken";
const BATCH: &str = "/keyward.v1.ValidationService/BatchValidateTokens";
const CHECK: &str = "/envoy.service.auth.v3.Authorization/Check";

/// Makes one request. With the same seed it is the same request but for the twin, whose secrets are as long.
pub fn request(seed: u64, cast: &Cast, twin: usize) -> Sent {
    let mut random = Random(seed);
    let is_wild = random.below(4) == 0;
    let twin = if is_wild { SHARED } else { twin };
    let mut maker = Maker { random, cast, twin, is_wild, shape: String::new() };
    let path = match maker.below(60) {
        0 => "/keyward.v1.ValidationService/ValidateToken?x=1",
        1 => "/keyward.v1.ValidationService/ValidateToken/",
        2..15 => BATCH,
        15..30 => CHECK,
        _ => VALIDATE,
    };
    maker.say(path);
    let method = if maker.once_in(80) { maker.also("GET", "GET") } else { "POST" };
    let mut headers = maker.caller();
    headers.extend(maker.headers());
    let message = match path {
        BATCH => maker.batch(),
        CHECK => checks::request(&mut maker),
        _ => maker.question(),
    };
    let body = maker.body(message, &mut headers);
    let pieces = maker.pieces(body);
    let trailers = maker.once_in(12) && maker.also("trailers", true);
    Sent { path, method, headers, pieces, trailers, shape: maker.shape }
}

struct Maker<'a> {
    random: Random,
    cast: &'a Cast,
    twin: usize,
    is_wild: bool,
    shape: String,
}

impl Maker<'_> {
    fn say(&mut self, word: &str) {
        write!(self.shape, "{word} ").expect("room");
    }

    /// Says a word, and hands on a value.
    fn also<T>(&mut self, word: &str, value: T) -> T {
        self.say(word);
        value
    }

    fn below(&mut self, end: usize) -> usize {
        self.random.below(end as u64) as usize
    }

    fn once_in(&mut self, times: usize) -> bool {
        self.below(times) == 0
    }

    fn pick<T: Copy>(&mut self, of: &[T]) -> T {
        of[self.below(of.len())]
    }

    fn secret<'b>(&mut self, of: &'b [Twins], twin: usize) -> &'b str {
        // The first is the plain one, which is what most requests are about.
        let chosen = &of[if self.once_in(2) { 0 } else { self.below(of.len()) }];
        self.say(chosen.name);
        &chosen.secrets[twin]
    }

    fn caller(&mut self) -> Vec<(&'static str, Vec<u8>)> {
        let (cast, twin) = (self.cast, self.twin);
        self.say("by");
        let of = if self.once_in(2) { &cast.callers[..4] } else { &cast.callers[..] };
        let token = self.secret(of, twin).to_owned();
        let one = |text: String| vec![("authorization", text.into_bytes())];
        let (kind, place) = (self.below(80), self.below(token.len()));
        match kind {
            0 => self.also("without-authorization", Vec::new()),
            1 => self.also("authorization-twice", [one(format!("Bearer {token}")), one(format!("Bearer {token}"))].concat()),
            2 => self.also("lower-case-scheme", one(format!("bearer {token}"))),
            3 => self.also("upper-case-scheme", one(format!("BEARER {token}"))),
            4 => self.also("blank-at-the-end", one(format!("Bearer {token} "))),
            5 => self.also("two-blanks", one(format!("Bearer  {token}"))),
            6 => self.also("basic", one(format!("Basic {token}"))),
            7 => self.also("no-scheme", one(token)),
            8 => self.also("no-token", one("Bearer ".to_owned())),
            9 => self.also("tab", one(format!("Bearer\t{token}"))),
            10 => self.also("near-miss", one(format!("Bearer {}", near_miss(&token, place)))),
            11 => self.also("not-utf8", vec![("authorization", [b"Bearer ", token.as_bytes(), b"\xff"].concat())]),
            12 => self.also("long", one(format!("Bearer {token}{token}"))),
            _ => one(format!("Bearer {token}")),
        }
    }

    fn headers(&mut self) -> Vec<(&'static str, Vec<u8>)> {
        let mut headers: Vec<(&'static str, Vec<u8>)> = Vec::new();
        if self.once_in(20) {
            self.say("without-te");
        } else {
            headers.push(("te", b"trailers".to_vec()));
        }
        if self.once_in(8) {
            let time = self.pick(&[
                "20S",
                "1H",
                "15000m",
                "99999999H",
                "30000000u",
                "0n",
                "0S",
                "",
                "5",
                "S",
                "123456789S",
                "+9S",
                "-9S",
                "1.5S",
                "9s",
                "9 S",
                "\u{e9}S",
            ]);
            self.say(&format!("grpc-timeout={time:?}"));
            headers.push(("grpc-timeout", time.as_bytes().to_vec()));
            if self.once_in(10) {
                self.say("twice");
                headers.push(("grpc-timeout", b"7S".to_vec()));
            }
        }
        for (name, value) in [
            ("user-agent", "grpc-c/1"),
            ("grpc-accept-encoding", "identity, gzip"),
            ("grpc-accept-encoding", "gzip"),
            ("accept-encoding", "gzip"),
            ("x-request-id", "7"),
            ("x-data-bin", "AAEC"),
            ("grpc-encoding", "identity"),
            ("grpc-encoding", "gzip"),
            ("grpc-encoding", "snappy"),
            ("grpc-encoding", ""),
            ("grpc-status", "0"),
            ("expect", "100-continue"),
        ] {
            if self.once_in(120) {
                self.say(&format!("{name}={value:?}"));
                headers.push((name, value.as_bytes().to_vec()));
            }
        }
        headers
    }

    fn batch(&mut self) -> Vec<u8> {
        let count = if self.once_in(50) { self.pick(&[100, 1000, 1001]) } else { self.pick(&[0, 1, 1, 2, 3, 3, 5, 8]) };
        self.say(&format!("of {count}:"));
        let mut message = Vec::new();
        for number in 0..count {
            let silent = number >= 8;
            let mark = self.shape.len();
            let entry = if count > 10 || self.once_in(2) { self.plain() } else { self.question() };
            if silent {
                self.shape.truncate(mark);
            }
            message.extend(self.length_delimited(1, &entry));
        }
        if self.once_in(10) { self.odd(vec![message]).concat() } else { message }
    }

    /// A question as clients ask them.
    fn plain(&mut self) -> Vec<u8> {
        let (cast, twin) = (self.cast, self.twin);
        let token = self.secret(&cast.tokens, twin).to_owned();
        self.length_delimited(1, token.as_bytes())
    }

    fn question(&mut self) -> Vec<u8> {
        self.say("[");
        let mut fields = vec![self.token()];
        fields.extend(self.audience());
        fields.extend(self.scopes());
        fields.extend(self.address());
        fields.extend(self.http());
        if self.once_in(3) {
            let value = self.pick(&[0, 1, 1, 1, 2, 128, u64::MAX]);
            self.say(&format!("peek={value}"));
            fields.push([key(7, 0), varint(value)].concat());
        }
        if self.once_in(5) {
            fields = self.odd(fields);
        }
        let mut message = fields.concat();
        if self.is_wild && self.once_in(3) {
            self.damage(&mut message);
        }
        self.say("]");
        message
    }

    fn token(&mut self) -> Vec<u8> {
        let (cast, twin) = (self.cast, self.twin);
        let secret = self.secret(&cast.tokens, twin).to_owned();
        let (kind, place) = (self.below(30), self.below(secret.len()));
        let text = match kind {
            0 => self.also("empty", Vec::new()),
            1 => self.also("invented", b"kw_AJZzEYqjUBsyrYcJGwcYAZEcR5Ql1G0000000000000000".to_vec()),
            2 | 3 => self.also("near-miss", near_miss(&secret, place).into_bytes()),
            4 => self.also("shorter", secret.as_bytes()[..secret.len() - 1].to_vec()),
            5 => self.also("longer", [secret.as_bytes(), b"0"].concat()),
            6 => self.also("not-utf8", [secret.as_bytes(), b"\xff"].concat()),
            7 => self.also("with-scheme", format!("Bearer {secret}").into_bytes()),
            8 => self.also("nul", [secret.as_bytes(), b"\0"].concat()),
            9 => {
                let bytes = 16_384 - 40 + self.below(80);
                self.say(&format!("{bytes}-bytes"));
                vec![b'x'; bytes]
            }
            10 => return self.also("without-token", Vec::new()),
            _ => secret.into_bytes(),
        };
        self.length_delimited(1, &text)
    }

    fn audience(&mut self) -> Option<Vec<u8>> {
        let kind = if self.once_in(3) { self.below(16) } else { return None };
        let text: &[u8] = match kind {
            0..=6 => b"billing",
            7..=10 => b"shop",
            11 => b"",
            12 => b"Billing",
            13 => &[b'x'; 63],
            14 => &[b'x'; 64],
            _ => b"\xffbilling",
        };
        self.say(&format!("audience-{kind}"));
        Some(self.length_delimited(2, text))
    }

    fn scopes(&mut self) -> Vec<Vec<u8>> {
        const SCOPES: [&str; 12] = [
            "agents:list",
            "agents:list",
            "agents:create",
            "s1:read",
            "s7:read",
            "*",
            "agents:*",
            "Agents:list",
            "agents",
            "",
            "keyward:admin",
            "a:b:c",
        ];
        if !self.once_in(2) {
            return Vec::new();
        }
        let count = if self.once_in(8) { self.pick(&[0, 99, 100, 101, 120]) } else { self.pick(&[1, 1, 1, 2, 3, 20]) };
        let clean = !self.once_in(4);
        self.say(&format!("{count}-{}scopes", if clean { "good-" } else { "" }));
        let scope = |maker: &mut Self| {
            let text = if clean { maker.pick(&SCOPES[..5]) } else { maker.pick(&SCOPES) };
            if !clean && maker.once_in(30) { b"a:\xff".to_vec() } else { text.as_bytes().to_vec() }
        };
        (0..count)
            .map(|_| {
                let text = scope(self);
                self.length_delimited(3, &text)
            })
            .collect()
    }

    fn address(&mut self) -> Option<Vec<u8>> {
        const ADDRESSES: [&str; 16] = [
            "10.1.2.3",
            "10.1.2.3",
            "192.0.2.1",
            "2001:db8::7",
            "2001:DB8:0::7",
            "::ffff:10.1.2.3",
            "::ffff:192.0.2.1",
            "",
            "nowhere",
            "10.0.0.1:80",
            " 10.0.0.1",
            "010.0.0.1",
            "fe80::1%eth0",
            "10.1",
            "::",
            "[::1]",
        ];
        let address = match self.below(6) {
            0 => self.pick(&ADDRESSES),
            1 | 2 => self.pick(&ADDRESSES[..7]),
            _ => return None,
        };
        self.say(&format!("ip={address:?}"));
        Some(self.length_delimited(6, address.as_bytes()))
    }

    fn http(&mut self) -> Vec<Vec<u8>> {
        const METHODS: [&str; 7] = ["GET", "GET", "POST", "DELETE", "get", "G T", ""];
        const PATHS: [&str; 14] = [
            "/api/agents",
            "/api/agents",
            "/api/agents/7",
            "/api/agents?x=1",
            "/api/agents/",
            "/api//agents",
            "/api/Agents",
            "/api/%61gents",
            "/api/agents/../x",
            "api/agents",
            "/nowhere",
            "/",
            "",
            "/api/agents/%2f",
        ];
        if !self.once_in(4) {
            return Vec::new();
        }
        let (method, path) = (self.pick(&METHODS), self.pick(&PATHS));
        self.say(&format!("http={method:?} {path:?}"));
        let (with_method, with_path) = (!self.once_in(12), !self.once_in(12));
        self.say(&format!("{with_method}/{with_path}"));
        let mut fields = Vec::new();
        if with_method {
            fields.push(self.length_delimited(4, method.as_bytes()));
        }
        if with_path {
            fields.push(self.length_delimited(5, path.as_bytes()));
        }
        fields
    }

    /// What protobuf allows, or does not, and clients hardly ever send.
    fn odd(&mut self, mut fields: Vec<Vec<u8>>) -> Vec<Vec<u8>> {
        for _ in 0..=self.below(2) {
            let place = self.below(fields.len() + 1);
            let kind = self.below(20);
            self.say(&format!("odd-{kind}@{place}"));
            let field = match kind {
                0 => {
                    self.say("a-second-token");
                    self.plain()
                }
                1 => [key(100, 0), varint(300)].concat(),
                2 => [key(100, 1), vec![7; 8]].concat(),
                3 => [key(100, 2), varint(3), vec![9; 3]].concat(),
                4 => [key(100, 5), vec![7; 4]].concat(),
                5 => [key(100, 3), key(1, 0), varint(1), key(2, 2), varint(2), vec![1; 2], key(100, 4)].concat(),
                6 => key(100, 3),
                7 => key(100, 4),
                8 => [key(100, 3), key(101, 4)].concat(),
                9 => [key(100, 3).repeat(120), key(100, 4).repeat(120)].concat(),
                // Wrong wire types of known fields.
                10 => [key(1 + self.below(7) as u64, 0), varint(5)].concat(),
                11 => [key(1 + self.below(7) as u64, 2), varint(1), vec![b'1']].concat(),
                12 => [key(1 + self.below(7) as u64, 5), vec![1; 4]].concat(),
                13 => [key(1 + self.below(7) as u64, 3), key(1, 4)].concat(),
                14 => [vec![0x00], varint(1)].concat(),
                15 => [key(1, 6), vec![1]].concat(),
                16 => vec![0xff; 11],
                17 => [varint((1 << 32) | (7 << 3)), varint(1)].concat(),
                18 => [key((1 << 29) - 1, 0), vec![0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x01]].concat(),
                _ => [key(7, 0), vec![0x81, 0x80, 0x00]].concat(),
            };
            fields.insert(place, field);
        }
        if self.once_in(3) {
            let turn = self.below(fields.len());
            fields.rotate_left(turn);
            self.say(&format!("turned-{turn}"));
        }
        fields
    }

    /// What was a message, and most likely is none any more.
    fn damage(&mut self, message: &mut Vec<u8>) {
        if message.is_empty() {
            return;
        }
        let place = self.below(message.len());
        match self.below(4) {
            0 => {
                self.say(&format!("cut@{place}"));
                message.truncate(place);
            }
            1 => {
                self.say(&format!("bit-0@{place}"));
                message[place] ^= 1;
            }
            2 => {
                self.say(&format!("bit-7@{place}"));
                message[place] ^= 0x80;
            }
            _ => {
                self.say("and-garbage");
                message.extend([0xff, 0xff]);
            }
        }
    }

    /// The message in its frame, or in something like one.
    fn body(&mut self, message: Vec<u8>, headers: &mut Vec<(&'static str, Vec<u8>)>) -> Vec<u8> {
        let length = message.len();
        let frame = |flags: u8, length: usize, message: &[u8]| {
            [&[flags][..], &u32::try_from(length).expect("small").to_be_bytes(), message].concat()
        };
        let more = 1 + self.below(20);
        let kind = self.below(90);
        if (3..=4).contains(&kind) && !self.is_wild {
            return frame(0, length, &message);
        }
        match kind {
            0 => self.also("no-body", Vec::new()),
            1 => self.also("two-messages", frame(0, length, &message).repeat(2)),
            2 => self.also("too-long-a-prefix", frame(0, length + more, &message)),
            3 | 4 => self.also("too-short-a-prefix", frame(0, length.saturating_sub(more), &message)),
            17 => self.also("flag-1", frame(1, length, &message)),
            5 => {
                headers.push(("grpc-encoding", b"gzip".to_vec()));
                self.also("flag-1-gzip", frame(1, length, &message))
            }
            6 => {
                headers.push(("grpc-encoding", b"identity".to_vec()));
                self.also("flag-1-identity", frame(1, length, &message))
            }
            7 => self.also("flag-2", frame(2, length, &message)),
            8 => self.also("flag-255", frame(255, length, &message)),
            9 => self.also("half-a-prefix", frame(0, length, &message)[..3].to_vec()),
            10 => self.also("prefix-alone", frame(0, length, &[])),
            11 => self.also("empty-message", frame(0, 0, &[])),
            12 => self.also("a-byte-more", [frame(0, length, &message), vec![0]].concat()),
            13 => self.also("huge-prefix", frame(0, 1 << 31, &message)),
            14 => self.also("too-large", frame(0, 2 << 20, &vec![0; 2 << 20])),
            15 | 16 => self.also("padded-to-the-limit", {
                let padding = (16_384_usize + 8).saturating_sub(length + more);
                let padded = [message, key(100, 2), varint(padding as u64), vec![0; padding]].concat();
                frame(0, padded.len(), &padded)
            }),
            _ => frame(0, length, &message),
        }
    }

    fn pieces(&mut self, body: Vec<u8>) -> Vec<(Vec<u8>, bool)> {
        if body.is_empty() && self.once_in(2) {
            return self.also("that ends with its head", Vec::new());
        }
        let mut borders = Vec::new();
        match self.below(6) {
            0 if body.len() < 200 => {
                self.say("byte-by-byte");
                borders.extend(1..body.len());
            }
            0 | 1 => borders.extend((0..=self.below(4)).map(|_| self.below(body.len() + 1))),
            _ => {}
        }
        borders.push(body.len());
        if self.once_in(8) {
            // An empty frame at the end.
            borders.push(body.len());
        }
        borders.sort_unstable();
        let slow = borders.len() < 6 && self.once_in(8);
        self.say(&format!("in {} pieces{}", borders.len(), if slow { ", slowly" } else { "" }));
        let mut begin = 0;
        borders
            .into_iter()
            .map(|end| {
                let piece = (body[begin..end].to_vec(), slow);
                begin = end;
                piece
            })
            .collect()
    }

    /// A field with a length, written the long way now and then.
    fn length_delimited(&mut self, number: u64, bytes: &[u8]) -> Vec<u8> {
        let (mut key, mut length) = (key(number, 2), varint(bytes.len() as u64));
        match self.below(300) {
            0 => {
                self.say("long-key");
                lengthen(&mut key);
            }
            1 => {
                self.say("long-length");
                lengthen(&mut length);
            }
            2 if self.is_wild => {
                self.say("overrun");
                length = varint(bytes.len() as u64 + 1);
            }
            3 if self.is_wild => {
                self.say("huge-length");
                length = varint(u64::MAX);
            }
            _ => {}
        }
        [key, length, bytes.to_vec()].concat()
    }
}

fn key(number: u64, wire_type: u64) -> Vec<u8> {
    varint((number << 3) | wire_type)
}

fn varint(mut number: u64) -> Vec<u8> {
    let mut bytes = Vec::new();
    while number >= 0x80 {
        bytes.push(number as u8 | 0x80);
        number >>= 7;
    }
    bytes.push(number as u8);
    bytes
}

/// The same number in one byte more.
fn lengthen(varint: &mut Vec<u8>) {
    *varint.last_mut().expect("a byte") |= 0x80;
    varint.push(0);
}

/// A text of the same length that is no token: one letter is the next one of the alphabet.
fn near_miss(text: &str, place: usize) -> String {
    let next = |letter: char| match letter {
        'z' | 'Z' | '9' | '_' => '0',
        letter => (letter as u8 + 1) as char,
    };
    text.chars().enumerate().map(|(index, letter)| if index == place { next(letter) } else { letter }).collect()
}
