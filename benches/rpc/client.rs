//! The client that the bench starts as a process of its own: it asks about many tokens, as fast as the server answers or at a fixed rate.
//!
//! It reads an order a line, and answers with numbers on one line: questions that were answered, those answered with `valid`, seconds; of calls at
//! a fixed rate also what they took.

use std::{
    fmt::Write as _,
    io::{BufRead as _, ErrorKind, Read as _, Write as _},
    net::Ipv4Addr,
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use keyward::proto;
use prost::Message as _;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    task::JoinSet,
};

use crate::{
    stats::percentile,
    wire::{self, Line},
};

/// As h2load is told: connections, and calls under way on each.
pub const CONNECTIONS: usize = 8;
pub const UNDER_WAY: usize = 32;
/// Batches under way on each connection.
const BATCHES_UNDER_WAY: usize = 4;
/// Requests in one write of a stream, and under way on it.
const STREAM_WRITE: usize = 64;
const STREAM_UNDER_WAY: usize = 4 * STREAM_WRITE;
/// The share of the first calls at a fixed rate that is not counted: caches and windows are cold.
const WARM_UP: usize = 10;
/// `peek: true` at the end of a `ValidateTokenRequest`.
const PEEK: [u8; 2] = [0x38, 1];

/// The question about a token that every part of the bench asks.
pub fn question(token: &str) -> Vec<u8> {
    let request = proto::ValidateTokenRequest {
        token: token.to_owned(),
        audience: "billing".to_owned(),
        required_scopes: vec!["agents:list".to_owned()],
        client_ip: "192.0.2.7".to_owned(),
        ..Default::default()
    };
    request.encode_to_vec()
}

/// A connection with its socket.
pub struct Wire {
    pub line: Line,
    stream: TcpStream,
    buffer: Vec<u8>,
}

impl Wire {
    pub async fn connect(port: u16, path: &str, caller: &str) -> Self {
        let stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).await.expect("a connection");
        stream.set_nodelay(true).expect("a socket");
        let mut wire = Self { line: Line::new(path, caller), stream, buffer: vec![0; 1 << 16] };
        while !wire.line.is_greeted() {
            wire.turn(|_, _, _| ()).await;
        }
        wire
    }

    /// Sends what waits, and takes what comes, as [`Line::receive`].
    pub async fn turn(&mut self, on: impl FnMut(u64, &mut Vec<u8>, bool)) {
        self.stream.write_all(&self.line.output).await.expect("sent");
        self.line.output.clear();
        let count = self.stream.read(&mut self.buffer).await.expect("an answer");
        assert!(count > 0, "the server has closed the connection");
        self.line.receive(&self.buffer[..count], on);
    }
}

/// Questions that were answered, and those that were answered with `valid`.
#[derive(Clone, Copy, Default)]
pub struct Answered {
    pub count: u64,
    pub valid: u64,
}

impl Answered {
    /// Takes the whole answer of a call.
    fn take_single(&mut self, received: &[u8]) {
        let (message, _) = wire::unframed(received).expect("an answer, not an error");
        self.count += 1;
        self.valid += u64::from(wire::says_valid(message));
    }

    /// Takes the entries of a message.
    fn take_entries(&mut self, message: &[u8]) {
        let (entries, valid) = wire::count_valid(message);
        self.count += entries;
        self.valid += valid;
    }
}

/// What a client knows.
struct Asker {
    port: u16,
    caller: String,
    questions: Vec<Vec<u8>>,
}

/// `--client PORT CALLER FILE`.
pub fn run(arguments: &[String]) {
    let [port, caller, tokens] = arguments else { panic!("--client PORT CALLER FILE") };
    let text = std::fs::read_to_string(Path::new(tokens)).expect("tokens");
    let questions = text.lines().map(question).collect();
    let asker = Arc::new(Asker { port: port.parse().expect("a port"), caller: caller.clone(), questions });
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    for order in std::io::stdin().lock().lines() {
        let order = order.expect("an order");
        let words: Vec<&str> = order.split(' ').collect();
        let numbers = match words[..] {
            ["closed", calls] => runtime.block_on(asker.closed(calls.parse().expect("a number"))),
            ["paced", rate, seconds] => asker.paced(rate.parse().expect("a number"), seconds.parse().expect("a number")),
            ["batch", size, peek] => runtime.block_on(asker.batches(size.parse().expect("a number"), peek == "peek")),
            ["stream", peek] => runtime.block_on(asker.streams(peek == "peek")),
            _ => panic!("no such order: {order}"),
        };
        let mut line = String::new();
        for number in numbers {
            write!(line, "{number} ").expect("text");
        }
        println!("{line}");
        std::io::stdout().flush().expect("heard");
    }
}

impl Asker {
    /// Everybody's share of the questions, each on a connection of its own.
    async fn on_all<F>(self: &Arc<Self>, total: usize, share: impl Fn(Arc<Self>, std::ops::Range<usize>) -> F) -> Vec<f64>
    where
        F: Future<Output = Answered> + Send + 'static,
    {
        let begin = Instant::now();
        let mut tasks = JoinSet::new();
        for part in 0..CONNECTIONS {
            tasks.spawn(share(Arc::clone(self), total * part / CONNECTIONS..total * (part + 1) / CONNECTIONS));
        }
        let mut sum = Answered::default();
        for answered in tasks.join_all().await {
            sum.count += answered.count;
            sum.valid += answered.valid;
        }
        vec![sum.count as f64, sum.valid as f64, begin.elapsed().as_secs_f64()]
    }

    /// Single calls, the next as soon as one is answered.
    async fn closed(self: &Arc<Self>, calls: usize) -> Vec<f64> {
        self.on_all(calls, |asker, part| async move {
            let mut wire = Wire::connect(asker.port, wire::VALIDATE, &asker.caller).await;
            let messages = part.map(|index| wire::framed(&asker.questions[index % asker.questions.len()]));
            calls_in_turn(&mut wire, UNDER_WAY, messages, Answered::take_single).await
        })
        .await
    }

    /// All tokens, so many in a call.
    async fn batches(self: &Arc<Self>, size: usize, peek: bool) -> Vec<f64> {
        self.on_all(self.questions.len().div_ceil(size), |asker, part| async move {
            let mut wire = Wire::connect(asker.port, wire::BATCH, &asker.caller).await;
            let messages = part.map(|batch| {
                let end = asker.questions.len().min((batch + 1) * size);
                wire::framed(&batch_of(&asker.questions[batch * size..end], peek))
            });
            calls_in_turn(&mut wire, BATCHES_UNDER_WAY, messages, |answered, received| {
                answered.take_entries(wire::unframed(received).expect("an answer, not an error").0);
            })
            .await
        })
        .await
    }

    /// All tokens, on one stream a connection.
    async fn streams(self: &Arc<Self>, peek: bool) -> Vec<f64> {
        self.on_all(self.questions.len(), |asker, part| async move {
            let mut wire = Wire::connect(asker.port, wire::STREAM, &asker.caller).await;
            stream(&mut wire, &asker.questions[part], peek).await
        })
        .await
    }

    /// Calls at a fixed rate, whatever becomes of those before. What a call takes is counted from the moment at which it should have been sent.
    /// The sockets are looked at without a pause: no timer is exact enough.
    fn paced(&self, rate: f64, seconds: f64) -> Vec<f64> {
        let mut lines: Vec<_> = (0..CONNECTIONS).map(|_| Polled::connect(self.port, &self.caller)).collect();
        let total = (rate * seconds) as usize;
        let due = |index: usize| Duration::from_secs_f64(index as f64 / rate);
        let (mut sent, mut answered) = (0, Answered::default());
        let (mut latencies, mut late) = (Vec::with_capacity(total), Vec::with_capacity(total));
        let begin = Instant::now();
        while answered.count < total as u64 {
            while sent < total && due(sent) <= begin.elapsed() {
                let polled = &mut lines[sent % CONNECTIONS];
                if !polled.line.has_room() {
                    break;
                }
                polled.line.call(sent as u64, &wire::framed(&self.questions[sent % self.questions.len()]));
                polled.flush();
                late.push(begin.elapsed().saturating_sub(due(sent)).as_nanos() as u64);
                sent += 1;
            }
            for polled in &mut lines {
                polled.receive(|tag, received| {
                    answered.take_single(received);
                    if tag as usize >= total / WARM_UP {
                        latencies.push(begin.elapsed().saturating_sub(due(tag as usize)).as_nanos() as u64);
                    }
                });
            }
        }
        let elapsed = begin.elapsed().as_secs_f64();
        latencies.sort_unstable();
        late.sort_unstable();
        let micros = |sorted: &[u64], share| percentile(sorted, share) as f64 / 1e3;
        vec![answered.count as f64, answered.valid as f64, elapsed, micros(&latencies, 0.5), micros(&latencies, 0.99), micros(&late, 0.99)]
    }
}

fn batch_of(questions: &[Vec<u8>], peek: bool) -> Vec<u8> {
    let mut message = Vec::new();
    for question in questions {
        message.push(0x0a);
        prost::encode_length_delimiter(question.len() + if peek { PEEK.len() } else { 0 }, &mut message).expect("room");
        message.extend_from_slice(question);
        message.extend_from_slice(if peek { &PEEK } else { &[] });
    }
    message
}

/// Makes these calls, so many at once.
pub async fn calls_in_turn(
    wire: &mut Wire,
    under_way: usize,
    messages: impl Iterator<Item = Vec<u8>>,
    take: impl Fn(&mut Answered, &[u8]),
) -> Answered {
    let (mut answered, mut messages) = (Answered::default(), messages.fuse().peekable());
    loop {
        while wire.line.under_way() < under_way && wire.line.has_room() {
            let Some(message) = messages.next() else { break };
            wire.line.call(0, &message);
        }
        if wire.line.under_way() == 0 && messages.peek().is_none() {
            return answered;
        }
        wire.turn(|_, received, has_ended| {
            if has_ended {
                take(&mut answered, received);
            }
        })
        .await;
    }
}

/// Asks all of this on one stream.
async fn stream(wire: &mut Wire, questions: &[Vec<u8>], peek: bool) -> Answered {
    let id = wire.line.open(0);
    let (mut sent, mut answered, mut has_ended) = (0, Answered::default(), false);
    let mut write = Vec::new();
    while !has_ended {
        while sent < questions.len() && sent - answered.count as usize <= STREAM_UNDER_WAY - STREAM_WRITE {
            let end = questions.len().min(sent + STREAM_WRITE);
            write.clear();
            for question in &questions[sent..end] {
                let length = u32::try_from(question.len() + if peek { PEEK.len() } else { 0 }).expect("small");
                write.push(0);
                write.extend_from_slice(&length.to_be_bytes());
                write.extend_from_slice(question);
                write.extend_from_slice(if peek { &PEEK } else { &[] });
            }
            if wire.line.room_of(id) < write.len() {
                break;
            }
            sent = end;
            wire.line.send(id, &write, sent == questions.len());
        }
        wire.turn(|_, received, is_last| {
            let mut taken = 0;
            while let Some((message, rest)) = wire::unframed(&received[taken..]) {
                answered.take_entries(message);
                taken = received.len() - rest.len();
            }
            received.drain(..taken);
            has_ended = is_last;
        })
        .await;
    }
    assert_eq!(answered.count, questions.len() as u64, "answers on a stream");
    answered
}

/// A connection whose socket never waits.
struct Polled {
    line: Line,
    stream: std::net::TcpStream,
    buffer: Vec<u8>,
}

impl Polled {
    fn connect(port: u16, caller: &str) -> Self {
        let stream = std::net::TcpStream::connect((Ipv4Addr::LOCALHOST, port)).expect("a connection");
        stream.set_nodelay(true).and_then(|()| stream.set_nonblocking(true)).expect("a socket");
        let mut polled = Self { line: Line::new(wire::VALIDATE, caller), stream, buffer: vec![0; 1 << 16] };
        while !polled.line.is_greeted() {
            polled.receive(|_, _| ());
        }
        polled
    }

    fn flush(&mut self) {
        if self.line.output.is_empty() {
            return;
        }
        match self.stream.write(&self.line.output) {
            Ok(count) => drop(self.line.output.drain(..count)),
            Err(error) => assert_eq!(error.kind(), ErrorKind::WouldBlock, "{error}"),
        }
    }

    fn receive(&mut self, mut on: impl FnMut(u64, &[u8])) {
        self.flush();
        match self.stream.read(&mut self.buffer) {
            Ok(count) => {
                assert!(count > 0, "the server has closed the connection");
                self.line.receive(&self.buffer[..count], |tag, received, has_ended| {
                    if has_ended {
                        on(tag, received);
                    }
                });
            }
            Err(error) => assert_eq!(error.kind(), ErrorKind::WouldBlock, "{error}"),
        }
    }
}
