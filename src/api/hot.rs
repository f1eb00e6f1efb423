//! The short way: questions about tokens that memory can answer at once, ahead of the generated services.
//!
//! A call is answered here if everything about it is plain: the caller presents a token that memory knows and that is good, the whole message has come with the
//! head, it has no field that is not in the proto file, and memory knows each token that is asked about. Whatever is not plain is handed on untouched, and
//! nothing was counted for it. What is answered here never waits, so it takes no place among the calls that are under way and needs no deadline.
//!
//! Invariant: an answer from here is the one that the generated services would have given, to the byte (test `both_ways_give_the_same_answer`).
//! Invariant: the caller is judged for this very call, before a byte of the message is read (test `a_revoked_caller_finishes_nothing`).

mod question;

use std::{
    cell::RefCell,
    net::IpAddr,
    pin::Pin,
    task::{Context, Poll, Waker},
};

use bytes::{BufMut as _, Bytes};
use http::{
    HeaderMap, HeaderName, HeaderValue, Method, Request, Response,
    header::{AUTHORIZATION, CONTENT_TYPE},
};
use http_body::Frame;
use prost::Message as _;
use smallvec::SmallVec;
use tonic::{Status, body::Body};

use self::question::Asked;
use super::{
    Api,
    envoy::Waiting,
    gate::{self, Active, Peer},
    gateway,
    validation::BATCH_MAX,
};
use crate::{
    ambient::Time,
    caller::{Access, Rights},
    grant::{Grant, Need, Verdict},
    proto::envoy::CheckRequest,
    token::{self, Digest, TokenId},
    validator::{Judgement, Question},
};

const GRPC: HeaderValue = HeaderValue::from_static("application/grpc");
const GRPC_ENCODING: HeaderName = HeaderName::from_static("grpc-encoding");
/// The prefix of a message: one byte of flags, four of length.
const FRAME_HEADER_BYTES: usize = 5;
/// Questions of a batch that are looked up together.
const GROUP: usize = 64;

/// An answer, from here or from the generated services.
pub enum Reply {
    /// From here: a message and the status OK. A message that the client may take some time for is under way until then.
    Plain(Option<Bytes>, Option<HeaderMap>, Option<Active>),
    /// From there.
    Generated(Body),
}

impl http_body::Body for Reply {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        match &mut *self {
            Self::Plain(message, trailers, _) => {
                Poll::Ready(message.take().map(Frame::data).or_else(|| trailers.take().map(Frame::trailers)).map(Ok))
            }
            Self::Generated(body) => Pin::new(body).poll_frame(context),
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Plain(message, trailers, _) => message.is_none() && trailers.is_none(),
            Self::Generated(body) => body.is_end_stream(),
        }
    }

    fn size_hint(&self) -> http_body::SizeHint {
        match self {
            Self::Plain(..) => http_body::SizeHint::default(),
            Self::Generated(body) => body.size_hint(),
        }
    }
}

impl Reply {
    /// Answers of this size, in bytes, fit into what every client takes at once.
    const SMALL_BYTES_MAX: usize = 32 * 1024;

    /// Whether the client may take some time for it.
    pub(super) fn is_large(&self) -> bool {
        matches!(self, Self::Plain(Some(message), ..) if message.len() > Self::SMALL_BYTES_MAX)
    }

    /// Is under way until it is sent.
    pub(super) fn under_way(self, active: Active) -> Self {
        match self {
            Self::Plain(message, trailers, _) => Self::Plain(message, trailers, Some(active)),
            generated @ Self::Generated(_) => generated,
        }
    }
}

/// A request's message, of which some may have been read already.
pub struct Begun<B> {
    read: SmallVec<[Bytes; 2]>,
    rest: B,
}

impl<B> Begun<B> {
    /// Of which nothing was read.
    pub fn new(rest: B) -> Self {
        Self { read: SmallVec::new(), rest }
    }
}

impl<B: http_body::Body<Data = Bytes> + Unpin> http_body::Body for Begun<B> {
    type Data = Bytes;
    type Error = B::Error;

    fn poll_frame(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, B::Error>>> {
        if self.read.is_empty() {
            return Pin::new(&mut self.rest).poll_frame(context);
        }
        Poll::Ready(Some(Ok(Frame::data(self.read.remove(0)))))
    }

    fn is_end_stream(&self) -> bool {
        self.read.is_empty() && self.rest.is_end_stream()
    }

    fn size_hint(&self) -> http_body::SizeHint {
        // Known only to whoever knows what was read.
        http_body::SizeHint::default()
    }
}

impl<B: http_body::Body<Data = Bytes> + Unpin> Begun<B> {
    /// The whole message, if it is there in one piece. What was read is kept.
    fn whole(&mut self) -> Option<Bytes> {
        let mut context = Context::from_waker(Waker::noop());
        loop {
            if self.rest.is_end_stream() {
                break;
            }
            match Pin::new(&mut self.rest).poll_frame(&mut context) {
                Poll::Ready(None) => break,
                Poll::Ready(Some(Ok(frame))) => match frame.into_data() {
                    Ok(data) if data.is_empty() => {}
                    Ok(data) => {
                        self.read.push(data);
                        // What came in pieces is put together elsewhere.
                        if self.read.len() > 1 {
                            return None;
                        }
                    }
                    // Trailers, which no client of ours sends: whoever reads on finds the end.
                    Err(_) => {}
                },
                // An error comes up again when somebody reads on.
                Poll::Ready(Some(Err(_))) | Poll::Pending => return None,
            }
        }
        match self.read.as_slice() {
            [message] => Some(message.clone()),
            _ => None,
        }
    }
}

/// What a connection remembers of its last caller: which digest those credentials have. Whether they are good is judged for each call.
#[derive(Default)]
pub struct Credentials(RefCell<Option<(HeaderValue, Digest)>>);

impl Credentials {
    fn digest(&self, value: &HeaderValue, prove: impl FnOnce(&[u8]) -> Option<Digest>) -> Option<Digest> {
        let mut last = self.0.borrow_mut();
        if let Some((known, digest)) = last.as_ref()
            && token::is_same_secret(known.as_bytes(), value.as_bytes())
        {
            return Some(*digest);
        }
        let digest = prove(gate::token_of(value)?)?;
        *last = Some((value.clone(), digest));
        Some(digest)
    }
}

/// The good caller of a call.
struct KnownCaller {
    token_id: TokenId,
    address: Option<IpAddr>,
    /// The only workspace whose tokens they may ask about; nothing: every one.
    workspace: Option<SmallVec<[u8; 64]>>,
}

impl KnownCaller {
    fn of(grant: &Grant, address: Option<IpAddr>) -> Option<Self> {
        let rights = Rights::of(grant.scopes());
        rights.authorize(Access::Validate).ok()?;
        let workspace = rights.validation_reach(grant.workspace()).map(|workspace| SmallVec::from_slice(workspace.as_bytes()));
        Some(Self { token_id: grant.token_id(), address, workspace })
    }

    /// As the validator takes it.
    fn reach(&self) -> Result<Option<&str>, std::str::Utf8Error> {
        self.workspace.as_deref().map(std::str::from_utf8).transpose()
    }
}

/// What was judged, until it is certain that the call is answered here.
#[derive(Default)]
struct Noted {
    hits: u64,
    uses: Vec<(TokenId, Option<IpAddr>)>,
    verdicts: Vec<Verdict>,
}

impl Api {
    /// Answers a call, if everything about it is plain.
    pub(super) fn answer_at_once<B>(
        &self,
        request: &mut Request<Begun<B>>,
        peer: &Peer,
        credentials: &Credentials,
        bytes_max: usize,
        now: Time,
    ) -> Option<Response<Reply>>
    where
        B: http_body::Body<Data = Bytes> + Unpin,
    {
        let headers = request.headers();
        let is_plain = request.method() == Method::POST && headers.get(CONTENT_TYPE) == Some(&GRPC) && !headers.contains_key(GRPC_ENCODING);
        if !is_plain || gate::deadline(headers, std::time::Duration::MAX).ok()?.is_zero() {
            return None;
        }
        let caller = self.known_caller(headers, peer, credentials, now)?;
        let message = request.body_mut().whole()?;
        let (flags, rest) = message.split_first_chunk::<FRAME_HEADER_BYTES>()?;
        let [0, length @ ..] = *flags else { return None };
        if rest.len() > bytes_max || u32::from_be_bytes(length) as usize != rest.len() {
            return None;
        }
        let frame = match request.uri().path() {
            gate::VALIDATE => self.answer_one(rest, caller.reach().ok()?, now),
            gate::BATCH => self.answer_batch(rest, caller.reach().ok()?, now),
            gate::CHECK => self.answer_check(rest, caller.reach().ok()?, now),
            _ => None,
        }?;
        self.validator.count(caller.token_id, caller.address, now);
        self.validator.count_hits(1);
        Some(plain(frame))
    }

    /// Answers messages of a stream, if everything about them is plain. Nobody's use of their own token is counted.
    pub(super) fn answer_messages_at_once<'a>(
        &self,
        messages: impl Iterator<Item = &'a [u8]>,
        headers: &HeaderMap,
        peer: &Peer,
        credentials: &Credentials,
        now: Time,
    ) -> Option<Vec<u8>> {
        let caller = self.known_caller(headers, peer, credentials, now)?;
        let mut frames = Vec::new();
        let noted = self.answer_groups(messages.map(Some), caller.reach().ok()?, now, &mut frames, question::put_message)?;
        self.note(noted, now);
        Some(frames)
    }

    fn known_caller(&self, headers: &HeaderMap, peer: &Peer, credentials: &Credentials, now: Time) -> Option<KnownCaller> {
        let address = Some(peer.address.ip().to_canonical());
        let question = Question { text: &[], need: Need { client_ip: address, ..Need::default() }, http: None, peek: false };
        let mut values = headers.get_all(AUTHORIZATION).iter();
        let (value, None) = (values.next()?, values.next()) else { return None };
        let digest = credentials.digest(value, |text| self.validator.prove(text))?;
        self.validator.judge_known(Some(digest), &question, now, |judgement| {
            judgement.grant.filter(|_| judgement.verdict == Verdict::Valid).and_then(|grant| KnownCaller::of(grant, address))
        })?
    }

    fn answer_one(&self, message: &[u8], reach: Option<&str>, now: Time) -> Option<Vec<u8>> {
        let asked = Asked::read(message)?;
        let question = asked.question(reach);
        let digest = self.validator.prove(question.text);
        self.validator.judge_known(digest, &question, now, |judgement| {
            self.note_one(digest.is_some(), judgement, &question, now);
            let mut frame = Vec::with_capacity(FRAME_HEADER_BYTES + question::answer_bytes(judgement, &question));
            frame.put_bytes(0, FRAME_HEADER_BYTES);
            question::put_answer(&mut frame, judgement, &question);
            finished(frame)
        })?
    }

    fn answer_check(&self, message: &[u8], reach: Option<&str>, now: Time) -> Option<Vec<u8>> {
        let request = CheckRequest::decode(message).ok()?;
        let waiting = Waiting::of(&request);
        let inquiry = match waiting.inquiry() {
            Ok(inquiry) => inquiry,
            Err(refusal) => return framed(&waiting.refused(&refusal, None)),
        };
        let question = match inquiry.question(reach) {
            Ok(question) => question,
            Err(refusal) => return framed(&waiting.refused(&refusal, None)),
        };
        let digest = self.validator.prove(question.text);
        self.validator.judge_known(digest, &question, now, |judgement| {
            self.note_one(digest.is_some(), judgement, &question, now);
            framed(&waiting.answer(&inquiry, judgement, gateway::decide(judgement, &question)))
        })?
    }

    fn answer_batch(&self, message: &[u8], reach: Option<&str>, now: Time) -> Option<Vec<u8>> {
        let mut frame = vec![0; FRAME_HEADER_BYTES];
        let noted = self.answer_groups(question::entries(message), reach, now, &mut frame, question::put_entry)?;
        if noted.verdicts.is_empty() {
            return None;
        }
        self.note(noted, now);
        finished(frame)
    }

    /// Judges questions and writes the answers one behind the other; nothing if one of them is not plain.
    fn answer_groups<'a>(
        &self,
        mut messages: impl Iterator<Item = Option<&'a [u8]>>,
        reach: Option<&str>,
        now: Time,
        frame: &mut Vec<u8>,
        put: impl Fn(&mut Vec<u8>, Judgement<'_>, &Question<'_>),
    ) -> Option<Noted> {
        let mut noted = Noted::default();
        loop {
            let mut group = SmallVec::<[Asked<'_>; GROUP]>::new();
            for message in messages.by_ref().take(GROUP) {
                group.push(Asked::read(message?)?);
            }
            if group.is_empty() {
                return Some(noted);
            }
            // Before all of them have been judged for nothing.
            if noted.verdicts.len() + group.len() > BATCH_MAX {
                return None;
            }
            let digests: SmallVec<[Option<Digest>; GROUP]> = group.iter().map(|asked| self.validator.prove(asked.token())).collect();
            self.validator.bring_near(digests.iter().copied().flatten());
            for (asked, digest) in group.iter().zip(digests) {
                noted.hits += u64::from(digest.is_some());
                let question = asked.question(reach);
                self.validator.judge_known(digest, &question, now, |judgement| {
                    put(frame, judgement, &question);
                    noted.uses.extend(judgement.used(&question).map(|token_id| (token_id, question.need.client_ip)));
                    noted.verdicts.push(judgement.verdict);
                })?;
            }
        }
    }

    fn note_one(&self, is_hit: bool, judgement: Judgement<'_>, question: &Question<'_>, now: Time) {
        self.validator.count_hits(is_hit.into());
        if let Some(token_id) = judgement.used(question) {
            self.validator.count(token_id, question.need.client_ip, now);
        }
        self.metrics.verdict(judgement.verdict);
    }

    /// Counts what was judged, now that it is certain that it is answered.
    fn note(&self, noted: Noted, now: Time) {
        self.validator.count_hits(noted.hits);
        for (token_id, client_ip) in noted.uses {
            self.validator.count(token_id, client_ip, now);
        }
        for verdict in noted.verdicts {
            self.metrics.verdict(verdict);
        }
    }
}

fn framed(message: &impl prost::Message) -> Option<Vec<u8>> {
    let mut frame = vec![0; FRAME_HEADER_BYTES];
    message.encode(&mut frame).ok()?;
    finished(frame)
}

/// Writes the length of a message into the prefix that was left free for it.
fn finished(mut frame: Vec<u8>) -> Option<Vec<u8>> {
    let length = u32::try_from(frame.len().checked_sub(FRAME_HEADER_BYTES)?).ok()?;
    frame.get_mut(1..FRAME_HEADER_BYTES)?.copy_from_slice(&length.to_be_bytes());
    Some(frame)
}

fn plain(frame: Vec<u8>) -> Response<Reply> {
    let mut trailers = HeaderMap::with_capacity(1);
    trailers.insert(Status::GRPC_STATUS, HeaderValue::from_static("0"));
    let mut response = Response::new(Reply::Plain(Some(frame.into()), Some(trailers), None));
    response.headers_mut().insert(CONTENT_TYPE, GRPC);
    response
}
