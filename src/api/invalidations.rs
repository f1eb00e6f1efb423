//! `WatchInvalidations`: what has changed, for callers who keep answers of their own.
//!
//! A task for each stream reads the feed of the fence and judges the caller anew before each message. Few messages wait for a reader who is slow, and one who is slower is let go.
//!
//! Invariant: whoever may not ask any more is told nothing more (tests `a_watcher_who_was_revoked_is_told_nothing_more`, `a_watcher_whose_rights_were_narrowed_is_told_nothing_more`).
//! Invariant: what waits for a slow reader is bounded, and the reader is told why it ended (test `a_watcher_who_does_not_read_is_let_go`).

use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::Bytes;
use http::{HeaderMap, Request, Response};
use tokio::{
    sync::{OwnedSemaphorePermit, mpsc, oneshot, watch},
    time::{sleep, timeout},
};
use tonic::{Status, body::Body, codegen::tokio_stream};

use super::{
    Api, Call,
    gate::{self, Gate, Judge, Method, Peer},
    status,
    stream::{self, Span},
};
use crate::{
    caller::Caller,
    error::{Error, Violations},
    fence::{Feed, Invalidation, News, Position},
    proto::{self, invalidation::Subject},
};

/// How often a message comes at least.
const HEARTBEAT: Duration = Duration::from_secs(1);
/// Before something that has failed is tried again.
const PAUSE: Duration = Duration::from_millis(100);
/// Messages that wait for a slow reader.
const WAITING_MAX: usize = 8;
/// How long a reader may take to take one.
const SLOWNESS_MAX: Duration = Duration::from_secs(10);

/// What a watcher is held by.
#[derive(Clone)]
pub(super) struct Watcher {
    gate: Arc<Gate>,
    method: Method,
    credentials: HeaderMap,
    peer: Peer,
    time: Span,
    /// Taken by the handler.
    place: Arc<parking_lot::Mutex<Option<OwnedSemaphorePermit>>>,
}

/// Lets a caller in who may watch.
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
    let time = Span::new(request.headers(), stream::age_max(gate.limits.stream_age_max))?;
    let patience = gate.limits.deadline_max.min(time.longest);
    let in_time = async {
        gate.identify(method, request.headers(), peer, Judge::BeforeTheMessage, who).await?;
        let mut request = gate::whole(request, method.request_bytes_max).await?;
        let Ok(place) = Arc::clone(&gate.watchers).try_acquire_owned() else {
            gate.api.metrics.shed();
            return Err(status::overloaded("too many streams are open; try again".to_owned()));
        };
        if let Some(call) = gate.identify(method, request.headers(), peer, Judge::WithTheMessage, who).await? {
            request.extensions_mut().insert(call);
        }
        let credentials = stream::credentials_of(request.headers());
        let place = Arc::new(parking_lot::Mutex::new(Some(place)));
        request.extensions_mut().insert(Watcher { gate: Arc::clone(gate), method, credentials, peer: peer.clone(), time, place });
        Ok(gate.route(request).await)
    };
    timeout(patience, in_time).await.map_err(|_| status::deadline_exceeded())?
}

impl Api {
    pub(super) fn watch(&self, mut request: tonic::Request<proto::WatchInvalidationsRequest>) -> Result<Told, Status> {
        let watcher = request.extensions_mut().remove::<Watcher>();
        let watcher = watcher.ok_or_else(|| Error::Internal("a watcher came past the gate".into()))?;
        let (Call { caller, .. }, message) = super::call(request)?;
        let reach = caller.validation_reach().map(str::to_owned);
        let feed = self.fence.feed(position(message.after)?, reach.clone());
        let (messages, waiting) = mpsc::channel(WAITING_MAX);
        let (end, ended) = oneshot::channel();
        tokio::spawn(async move {
            // A reader who has gone hears nothing.
            let _heard = end.send(watcher.tell(feed, reach, &messages).await);
        });
        Ok(Told { waiting, ended, is_over: false })
    }
}

impl Watcher {
    /// Tells what has changed until there is a reason not to.
    async fn tell(self, mut feed: Feed, reach: Option<String>, messages: &mpsc::Sender<proto::WatchInvalidationsResponse>) -> Status {
        let _place = self.place.lock().take();
        let mut end = std::pin::pin!(sleep(self.time.longest));
        let mut closing = watch::Receiver::clone(&self.peer.closing);
        loop {
            let news = tokio::select! {
                news = feed.next(HEARTBEAT) => news,
                () = &mut end => return self.time.over(),
                _ = closing.wait_for(|closing| *closing) => return status::reopen(stream::CLOSING),
                () = messages.closed() => return Status::cancelled("the caller has gone"),
            };
            match self.is_still_good(reach.as_deref()).await {
                Ok(()) => {}
                Err(error @ (Error::Unauthenticated(_) | Error::Denied(_))) => return error.into(),
                // Nobody can say just now who asks. The position stays where it was, so that nothing is lost.
                Err(_) => {
                    sleep(PAUSE).await;
                    continue;
                }
            }
            let message = match news {
                Ok(news) => {
                    feed.take(&news);
                    told(news)
                }
                Err(Error::Unavailable(_) | Error::Overloaded(_)) => {
                    sleep(PAUSE).await;
                    continue;
                }
                Err(error) => return error.into(),
            };
            if messages.send_timeout(message, SLOWNESS_MAX).await.is_err() {
                return status::overloaded("messages were not taken for 10 seconds: resume with the last position".to_owned());
            }
        }
    }

    /// Whether the caller may go on hearing of this workspace; nothing: of all.
    async fn is_still_good(&self, reach: Option<&str>) -> Result<(), Error> {
        let call = self.gate.identify(self.method, &self.credentials, &self.peer, Judge::BeforeTheMessage, &mut None).await?;
        if call.is_some_and(|call| call.caller.validation_reach() == reach) {
            return Ok(());
        }
        Err(Error::Denied("the caller may ask about other workspaces than when the stream was opened: open a new one".to_owned()))
    }
}

/// What a watcher is told: messages, and then why there are no more.
pub struct Told {
    waiting: mpsc::Receiver<proto::WatchInvalidationsResponse>,
    ended: oneshot::Receiver<Status>,
    is_over: bool,
}

impl tokio_stream::Stream for Told {
    type Item = Result<proto::WatchInvalidationsResponse, Status>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        if self.is_over {
            return Poll::Ready(None);
        }
        if let Some(message) = ready!(self.waiting.poll_recv(context)) {
            return Poll::Ready(Some(Ok(message)));
        }
        let end = ready!(Pin::new(&mut self.ended).poll(context));
        self.is_over = true;
        Poll::Ready(Some(Err(end.unwrap_or_else(|lost| Error::Internal(lost.into()).into()))))
    }
}

fn position(after: Option<proto::WatchPosition>) -> Result<Option<Position>, Error> {
    let Some(proto::WatchPosition { epoch, number }) = after else { return Ok(None) };
    let mut violations = Violations::default();
    for (field, value, least) in [("after.epoch", epoch, 1), ("after.number", number, 0)] {
        if value < least {
            violations.add(field, "must be as a message of an earlier stream had it");
        }
    }
    violations.finish().map(|()| Some(Position { epoch, number }))
}

fn told(news: News) -> proto::WatchInvalidationsResponse {
    proto::WatchInvalidationsResponse {
        position: Some(proto::WatchPosition { epoch: news.position.epoch, number: news.position.number }),
        invalidations: news.invalidations.into_iter().map(invalidation).collect(),
        as_of_time: news.as_of.and_then(super::convert::timestamp),
    }
}

fn invalidation(invalidation: Invalidation) -> proto::Invalidation {
    match invalidation {
        Invalidation::Token { workspace, id } => proto::Invalidation { workspace, subject: Some(Subject::TokenId(id)) },
        Invalidation::Principal { workspace, id } => proto::Invalidation { workspace, subject: Some(Subject::Principal(id)) },
        Invalidation::Workspace(workspace) => proto::Invalidation { workspace, subject: None },
    }
}
