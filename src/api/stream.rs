//! `StreamValidateTokens`: questions about tokens on a stream that is held open, an answer to each in its place.
//!
//! The stream is the body of its own answer, written over the bare body of the request: what is wrong with one message must not end it, as it would if the framework
//! decoded it. Whoever writes the answer asks for more of it only when the client takes it, and only then is more of the request read. All messages that have come by then are judged
//! at one instant, as a group, and answered in one piece.
//!
//! Invariant: results come in the order of the requests, and a bad request costs nobody but itself (test `answers_come_in_order_and_a_bad_message_ends_nothing`).
//! Invariant: the caller is judged anew for every group (test `a_revoked_caller_ends_the_stream_with_its_next_message`).
//! Invariant: while answers are not taken nothing is read (test `who_does_not_read_is_not_read_either`).
//! Invariant: a stream ends when its connection is to end, and what is under way is answered first (tests `a_drain_ends_streams_at_once`,
//! `a_drain_answers_the_group_that_is_under_way`).

use std::{
    mem,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::{BufMut as _, Bytes, BytesMut};
use http::{
    HeaderMap, Request, Response,
    header::{AUTHORIZATION, CONTENT_TYPE},
};
use http_body::{Body as _, Frame};
use prost::Message as _;
use tokio::{
    sync::{OwnedSemaphorePermit, watch},
    time::{Sleep, sleep, timeout},
};
use tonic::{Code, Status, body::Body, metadata::GRPC_CONTENT_TYPE};

use super::{
    Api,
    gate::{self, Gate, Judge, METHODS, Method, Peer},
    hot::Credentials,
    status,
    validation::{question, required_scopes},
};
use crate::{
    ambient::{self, Stopwatch, Time},
    caller::Caller,
    error::{Error, Result as Outcome, Violations},
    proto::{self, stream_validate_tokens_response::Result as Kind},
    telemetry,
    token::TokenId,
    validator::{Answer as Judgement, Question},
};

/// Messages that are judged at one instant.
const GROUP_MAX: usize = 256;
/// So much of the request is read ahead at most, beside the last piece that came.
const READ_BYTES_MAX: usize = 256 * 1_024;
/// The prefix of a message: one byte of flags, four of length.
const PREFIX_BYTES: usize = 5;
/// The name of the header that says how messages are compressed.
const GRPC_ENCODING: &str = "grpc-encoding";

pub(super) const CLOSING: &str = "this connection is about to close: open a new stream";

/// What one message is answered with, before it is written.
type Answer = Result<proto::ValidateTokenResponse, Status>;
/// The answers to a group, or what ends the stream.
type Answers = Result<Bytes, Status>;

/// A group that is being judged.
enum Work {
    /// Memory knew all of it.
    Done(Bytes),
    Waiting(Pin<Box<dyn Future<Output = Answers> + Send>>),
}

impl Work {
    fn poll(&mut self, context: &mut Context<'_>) -> Poll<Answers> {
        match self {
            Self::Done(answers) => Poll::Ready(Ok(mem::take(answers))),
            Self::Waiting(answers) => answers.as_mut().poll(context),
        }
    }
}

/// Opens a stream for a caller who may.
pub(super) async fn open<B>(
    gate: &Arc<Gate>,
    method: Method,
    request: Request<B>,
    peer: &Peer,
    who: &mut Option<Caller>,
) -> Result<Response<Body>, Status>
where
    B: http_body::Body<Data = Bytes> + Send + 'static,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    let opened = Stopwatch::start();
    let (head, body) = request.into_parts();
    let time = Span::new(&head.headers, age_max(gate.limits.stream_age_max))?;
    if let Some(encoding) = head.headers.get(GRPC_ENCODING).filter(|encoding| *encoding != "identity") {
        return Err(Status::unimplemented(format!("messages compressed with {encoding:?} are not taken")));
    }
    let known = gate.identify(method, &head.headers, peer, Judge::WithTheMessage, who);
    timeout(gate.limits.deadline_max.min(time.longest), known).await.map_err(|_| status::deadline_exceeded())??;
    let Ok(place) = Arc::clone(&gate.streams).try_acquire_owned() else {
        gate.api.metrics.shed();
        return Err(status::overloaded("too many streams are open; try again, or ask without a stream".to_owned()));
    };
    let credentials = credentials_of(&head.headers);
    let asker = Arc::new(Asker { gate: Arc::clone(gate), method, credentials, peer: peer.clone() });
    let caller = who.as_ref().and_then(|caller| caller.token_id);
    let account = Account { asker: Arc::clone(&asker), opened, head: opened.elapsed(), code: Code::Cancelled, caller };
    let mut closing = watch::Receiver::clone(&peer.closing);
    let stream = Stream {
        requests: Body::new(body),
        inbox: Inbox::new(method.request_bytes_max),
        work: None,
        end: None,
        is_over: false,
        time,
        heard: opened,
        half: None,
        alarm: Box::pin(sleep(Duration::ZERO)),
        // An error says that the connection is gone.
        closing: Box::pin(async move { drop(closing.wait_for(|closing| *closing).await) }),
        asker,
        known: Credentials::default(),
        account,
        _place: place,
    };
    let mut response = Response::new(Body::new(stream));
    response.headers_mut().insert(CONTENT_TYPE, GRPC_CONTENT_TYPE);
    Ok(response)
}

/// The header by which a caller is judged anew.
pub(super) fn credentials_of(headers: &HeaderMap) -> HeaderMap {
    let mut credentials = HeaderMap::new();
    for value in headers.get_all(AUTHORIZATION) {
        credentials.append(AUTHORIZATION, value.clone());
    }
    credentials
}

/// How long streams stay open here: up to a tenth longer, so that they do not all come anew at once.
pub(super) fn age_max(age: Duration) -> Duration {
    let jitter = ambient::random::<1>().map_or(0, |[byte]| u32::from(byte));
    age + age / 10 * jitter / 256
}

/// How long one stream may stay open.
#[derive(Clone, Copy)]
pub(super) struct Span {
    pub(super) longest: Duration,
    is_the_callers: bool,
}

impl Span {
    pub(super) fn new(headers: &HeaderMap, ours: Duration) -> Result<Self, Status> {
        let longest = gate::deadline(headers, ours)?;
        if longest.is_zero() { Err(status::deadline_exceeded()) } else { Ok(Self { longest, is_the_callers: longest < ours }) }
    }

    pub(super) fn over(&self) -> Status {
        if self.is_the_callers {
            status::deadline_exceeded()
        } else {
            status::reopen("this stream has been open for as long as streams may be: open a new one")
        }
    }
}

/// Who asks, on one stream.
struct Asker {
    gate: Arc<Gate>,
    method: Method,
    /// The header by which they are judged anew for each group.
    credentials: HeaderMap,
    peer: Peer,
}

impl Asker {
    /// Begins to answer a group: at once if memory knows all of it, or else where the store is.
    fn begin(self: &Arc<Self>, group: Bytes, known: &Credentials) -> Work {
        let gate = &self.gate;
        if let Some(answers) = gate.api.answer_messages_at_once(messages(&group), &self.credentials, &self.peer, known, gate.clock.now()) {
            return Work::Done(answers.into());
        }
        let answers = gate.elsewhere(Arc::clone(self).answer(group));
        Work::Waiting(Box::pin(async { answers.await? }))
    }

    /// Answers a group of messages, if its caller is still good.
    async fn answer(self: Arc<Self>, group: Bytes) -> Answers {
        let _active = self.gate.begin();
        // Whatever keeps the store busy: each message is told, and may be sent again.
        let answers = match timeout(self.gate.limits.deadline_max, self.judge(&group)).await {
            Ok(answers) => answers?,
            Err(_) => messages(&group).map(|_| Err(status::deadline_exceeded())).collect(),
        };
        let mut written = BytesMut::with_capacity(group.len() + answers.len() * 128);
        for answer in answers {
            write(answer, &mut written);
        }
        Ok(written.freeze())
    }

    async fn judge(&self, group: &Bytes) -> Result<Vec<Answer>, Status> {
        let mut who = None;
        let found = self.gate.identify(self.method, &self.credentials, &self.peer, Judge::BeforeTheMessage, &mut who).await;
        match found {
            Ok(Some(call)) => Ok(self.gate.api.answer_each(messages(group), &call.caller, call.now).await),
            Ok(None) => Err(Error::Internal("a stream without a caller".into()).into()),
            Err(error @ (Error::Unauthenticated(_) | Error::Denied(_))) => Err(error.into()),
            // Nobody can say who asks just now: that is no fault of theirs.
            Err(error) => {
                let status = Status::from(error);
                Ok(messages(group).map(|_| Err(status.clone())).collect())
            }
        }
    }
}

impl Api {
    /// Answers each message by itself, with what `ValidateToken` would answer or fail with. What the cache does not know is read together; if that fails, each by
    /// itself, so that the failure is told where it belongs.
    async fn answer_each<'a>(&self, messages: impl Iterator<Item = &'a [u8]>, caller: &Caller, now: Time) -> Vec<Answer> {
        let requests: Vec<_> = messages.map(read).collect();
        let mut checked: Vec<_> = requests.iter().map(|request| request.as_ref().map(checked)).collect();
        let reach = caller.validation_reach();
        let questions: Vec<_> = checked
            .iter_mut()
            .map(|checked| match checked {
                Ok((request, scopes, violations)) => {
                    let question = question("", request, scopes, reach, violations);
                    mem::take(violations).finish()?;
                    Ok(question)
                }
                Err(status) => Err(status.clone()),
            })
            .collect();
        let good: Vec<_> = questions.iter().flatten().copied().collect();
        let mut judgements = self.judge_each(&good, now).await.into_iter();
        let answer = |question: Result<Question<'_>, Status>| {
            let question = question?;
            let judgement = judgements.next().unwrap_or_else(|| Err(Error::Internal("a question was lost".into())));
            Ok(self.answer(judgement?, &question)?)
        };
        questions.into_iter().map(answer).collect()
    }

    async fn judge_each(&self, questions: &[Question<'_>], now: Time) -> Vec<Outcome<Judgement>> {
        if questions.len() > 1
            && let Ok(judgements) = self.validator.validate_batch(questions, now).await
        {
            return judgements.into_iter().map(Ok).collect();
        }
        let mut each: Vec<_> = questions.iter().map(|question| (Box::pin(self.validator.validate(*question, now)), None)).collect();
        std::future::poll_fn(|context| {
            for (judgement, outcome) in each.iter_mut().filter(|(_, outcome)| outcome.is_none()) {
                if let Poll::Ready(ready) = judgement.as_mut().poll(context) {
                    *outcome = Some(ready);
                }
            }
            if each.iter().all(|(_, outcome)| outcome.is_some()) { Poll::Ready(()) } else { Poll::Pending }
        })
        .await;
        each.into_iter().filter_map(|(_, outcome)| outcome).collect()
    }
}

fn read(message: &[u8]) -> Result<proto::ValidateTokenRequest, Status> {
    proto::ValidateTokenRequest::decode(message).map_err(|_| status::malformed_message())
}

/// A request, the scopes that it requires, and what is wrong with them.
fn checked(request: &proto::ValidateTokenRequest) -> (&proto::ValidateTokenRequest, Vec<&str>, Violations) {
    let mut violations = Violations::default();
    let scopes = required_scopes("", request, &mut violations);
    (request, scopes, violations)
}

/// The messages of a group that is whole.
fn messages(group: &[u8]) -> impl Iterator<Item = &[u8]> {
    let mut rest = group;
    std::iter::from_fn(move || {
        let (_, length) = prefix(rest)?;
        let (message, after) = rest.get(PREFIX_BYTES..)?.split_at_checked(length)?;
        rest = after;
        Some(message)
    })
}

/// The flags of the first message and its length, if they are there.
fn prefix(bytes: &[u8]) -> Option<(u8, usize)> {
    let (&[flags, length @ ..], _) = bytes.split_first_chunk::<PREFIX_BYTES>()?;
    Some((flags, usize::try_from(u32::from_be_bytes(length)).ok()?))
}

/// Writes an answer in its frame.
fn write(answer: Answer, into: &mut BytesMut) {
    let kind = match answer {
        Ok(answer) => Kind::Answer(answer),
        Err(status) => Kind::Error(status::message(status)),
    };
    let response = proto::StreamValidateTokensResponse { result: Some(kind) };
    into.put_u8(0);
    // No answer comes near 4 GiB.
    into.put_u32(u32::try_from(response.encoded_len()).unwrap_or(u32::MAX));
    // It fails for want of room alone, and the buffer grows.
    let _written = response.encode(into);
}

/// What has come of a request, and how much of it is whole messages.
struct Inbox {
    buffer: BytesMut,
    whole: usize,
    messages: usize,
    message_bytes_max: usize,
}

impl Inbox {
    fn new(message_bytes_max: usize) -> Self {
        Self { buffer: BytesMut::new(), whole: 0, messages: 0, message_bytes_max }
    }

    /// Finds where whole messages end.
    fn scan(&mut self) -> Result<(), Status> {
        while self.messages < GROUP_MAX
            && let Some((flags, length)) = self.buffer.get(self.whole..).and_then(prefix)
        {
            match flags {
                0 => {}
                1 => return Err(Status::internal("a message is compressed, and no grpc-encoding says how")),
                _ => return Err(Status::internal("the flags of a message are neither 0 nor 1")),
            }
            if length > self.message_bytes_max {
                return Err(status::message_too_large(self.message_bytes_max));
            }
            let end = self.whole + PREFIX_BYTES + length;
            if self.buffer.len() < end {
                break;
            }
            self.whole = end;
            self.messages += 1;
        }
        Ok(())
    }

    fn is_full(&self) -> bool {
        self.messages == GROUP_MAX || self.whole >= READ_BYTES_MAX
    }

    /// Whether a message has begun that is not whole yet.
    fn has_half(&self) -> bool {
        self.buffer.len() > self.whole
    }

    /// The whole messages, if there are any.
    fn take(&mut self) -> Option<Bytes> {
        self.messages = 0;
        match mem::take(&mut self.whole) {
            0 => None,
            whole => Some(self.buffer.split_to(whole).freeze()),
        }
    }
}

/// Counts a stream when it ends, however it ends.
struct Account {
    asker: Arc<Asker>,
    opened: Stopwatch,
    /// From the call to the head of its answer: what streams have in common with other calls.
    head: Duration,
    code: Code,
    caller: Option<TokenId>,
}

impl Drop for Account {
    fn drop(&mut self) {
        let (path, code) = (self.asker.method.path, usize::try_from(i32::from(self.code)).unwrap_or(0));
        let place = METHODS.iter().position(|method| method.path == path).unwrap_or(METHODS.len());
        self.asker.gate.api.metrics.request(place, code, self.head);
        tracing::debug!(
            method = path,
            code = telemetry::code_name(code),
            micros = self.opened.elapsed().as_micros(),
            peer = %self.asker.peer.address.ip(),
            caller = self.caller.map(tracing::field::display),
            "call"
        );
    }
}

/// A stream of questions: the body of its own answer.
struct Stream {
    requests: Body,
    inbox: Inbox,
    work: Option<Work>,
    /// What it ends with when everything that came before is answered.
    end: Option<Status>,
    is_over: bool,
    time: Span,
    /// When the last message came.
    heard: Stopwatch,
    /// Since when a message has been coming that is not whole yet.
    half: Option<Stopwatch>,
    alarm: Pin<Box<Sleep>>,
    closing: Pin<Box<dyn Future<Output = ()> + Send>>,
    asker: Arc<Asker>,
    known: Credentials,
    account: Account,
    _place: OwnedSemaphorePermit,
}

impl Stream {
    /// Why it has to end although messages may be waiting.
    fn overdue(&self) -> Option<Status> {
        if *self.asker.peer.closing.borrow() {
            return Some(status::reopen(CLOSING));
        }
        (self.account.opened.elapsed() >= self.time.longest).then(|| self.time.over())
    }

    /// Reads what has come, up to the bounds of a group.
    fn read(&mut self, context: &mut Context<'_>) -> Result<(), Status> {
        loop {
            self.inbox.scan()?;
            if self.inbox.is_full() {
                return Ok(());
            }
            match Pin::new(&mut self.requests).poll_frame(context) {
                Poll::Pending => return Ok(()),
                Poll::Ready(Some(Ok(frame))) => {
                    // Trailers say nothing here: the end comes after them.
                    if let Ok(data) = frame.into_data() {
                        self.inbox.buffer.put(data);
                    }
                }
                Poll::Ready(Some(Err(status))) => return Err(status),
                Poll::Ready(None) if self.inbox.has_half() => return Err(Status::internal("the stream ended within a message")),
                Poll::Ready(None) => return Err(Status::ok("")),
            }
        }
    }

    /// Begins to judge what was read; whether there was anything.
    fn begin_work(&mut self) -> bool {
        let Some(group) = self.inbox.take() else { return false };
        self.heard = Stopwatch::start();
        self.half = None;
        self.work = Some(self.asker.begin(group, &self.known));
        true
    }

    /// How long it may go on as things are, and what it ends with then.
    fn patience(&self) -> (Duration, Status) {
        let silence = self.asker.gate.limits.stream_silence_max.saturating_sub(self.heard.elapsed());
        let age = self.time.longest.saturating_sub(self.account.opened.elapsed());
        let half = self.half.map_or(Duration::MAX, |since| gate::MESSAGE_TIMEOUT.saturating_sub(since.elapsed()));
        if half <= silence.min(age) {
            (half, status::deadline_exceeded())
        } else if silence <= age {
            (silence, status::reopen("no message has come for long: open a new stream when there is one"))
        } else {
            (age, self.time.over())
        }
    }

    /// Waits for the end of patience, or of the connection.
    fn poll_end(&mut self, context: &mut Context<'_>) -> Poll<Status> {
        if self.closing.as_mut().poll(context).is_ready() {
            return Poll::Ready(status::reopen(CLOSING));
        }
        if self.half.is_none() && self.inbox.has_half() {
            self.half = Some(Stopwatch::start());
            self.alarm.set(sleep(gate::MESSAGE_TIMEOUT));
        }
        loop {
            ready!(self.alarm.as_mut().poll(context));
            let (left, status) = self.patience();
            if left.is_zero() {
                return Poll::Ready(status);
            }
            self.alarm.set(sleep(left));
        }
    }

    /// The last of the answer.
    fn farewell(&mut self, status: &Status) -> Frame<Bytes> {
        let completed = status::complete(status);
        let status = completed.as_ref().unwrap_or(status);
        self.account.code = status.code();
        self.is_over = true;
        let mut trailers = HeaderMap::new();
        // Our messages are fit for headers, and tonic escapes what is not.
        let _written = status.add_header(&mut trailers);
        Frame::trailers(trailers)
    }
}

impl http_body::Body for Stream {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let stream = &mut *self;
        loop {
            if stream.is_over {
                return Poll::Ready(None);
            }
            if let Some(work) = &mut stream.work {
                let answers = ready!(work.poll(context));
                stream.work = None;
                match answers {
                    Ok(answers) => return Poll::Ready(Some(Ok(Frame::data(answers)))),
                    Err(status) => stream.end = Some(status),
                }
            }
            if stream.end.is_none() {
                stream.end = stream.overdue();
            }
            if stream.end.is_none() {
                stream.end = stream.read(context).err();
                if stream.begin_work() {
                    continue;
                }
            }
            let status = match stream.end.take() {
                Some(status) => status,
                None => ready!(stream.poll_end(context)),
            };
            return Poll::Ready(Some(Ok(stream.farewell(&status))));
        }
    }
}
