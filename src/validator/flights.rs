//! One read of the store at a time for each thing that is missing, however many wait for it.

use std::{collections::HashMap, hash::Hash, sync::Arc};

use parking_lot::Mutex;
use tokio::sync::{OwnedSemaphorePermit, watch};

use crate::error::{Error, Result};

/// What became of a flight, as those hear it who wait for it.
#[derive(Clone)]
enum Landing<V> {
    /// Everybody may have it.
    Admitted(V),
    /// A change was announced meanwhile: only the call that began the flight may have it.
    Overtaken(V),
    /// It failed.
    Failed(Arc<Error>),
}

type Waiting<V> = watch::Receiver<Option<Landing<V>>>;

/// What is being read at present.
pub(super) struct Flights<K, V>(Mutex<HashMap<K, Waiting<V>>>);

impl<K, V> Default for Flights<K, V> {
    fn default() -> Self {
        Self(Mutex::default())
    }
}

/// A flight's place in the list of flights, given up when it lands, however it ends.
struct Entry<K: Eq + Hash, V> {
    flights: Arc<Flights<K, V>>,
    key: K,
    is_in_the_list: bool,
}

/// How a call gets what it asks for.
enum Way<V> {
    /// It is known by now.
    Known(V),
    /// By a flight; whether this call began it.
    Flight(Waiting<V>, bool),
}

/// How what is missing is looked up, read and taken up.
pub(super) struct Missing<L, P, B> {
    /// Looks once more whether it is known.
    pub(super) look: L,
    /// A permit for one more read.
    pub(super) permit: P,
    /// A read that was not sent yet, and what takes up its result: that answers whether no change was announced since.
    pub(super) begin: B,
}

impl<K: Eq + Hash, V> Entry<K, V> {
    /// Gives up the place and takes up what was read, in one step: whoever asks finds either the flight or what it brought.
    fn land(mut self, admit: impl FnOnce() -> bool) -> bool {
        let mut flights = self.flights.0.lock();
        flights.remove(&self.key);
        // Nobody can join any more: whoever joined had asked before it is seen now whether a change was announced.
        let admitted = admit();
        drop(flights);
        self.is_in_the_list = false;
        admitted
    }
}

impl<K: Eq + Hash, V> Drop for Entry<K, V> {
    fn drop(&mut self) {
        if self.is_in_the_list {
            self.flights.0.lock().remove(&self.key);
        }
    }
}

impl<K, V> Flights<K, V>
where
    K: Eq + Hash + Clone + Send + Sync + 'static,
    V: Clone + Send + Sync + 'static,
{
    /// Reads what is missing, together with everybody else who asks for it now.
    pub(super) async fn fetch<L, P, B, R, A>(self: &Arc<Self>, key: &K, missing: Missing<L, P, B>) -> Result<V>
    where
        L: Fn() -> Option<V>,
        P: Fn() -> Result<OwnedSemaphorePermit>,
        B: Fn() -> (R, A),
        R: Future<Output = Result<V>> + Send + 'static,
        A: FnOnce(&V) -> bool + Send + 'static,
    {
        let first = match self.join(key, &missing)? {
            Way::Known(value) => Some(value),
            Way::Flight(flight, began) => land(flight, began).await?,
        };
        if let Some(value) = first {
            return Ok(value);
        }
        // Whichever flight is in the list now began after this call did.
        match self.join(key, &missing)? {
            Way::Known(value) => Ok(value),
            Way::Flight(flight, _) => land(flight, true).await?.ok_or_else(|| Error::Internal("a look-up ended without an answer".into())),
        }
    }

    /// Joins the flight for a key, or begins one.
    fn join<L, P, B, R, A>(self: &Arc<Self>, key: &K, missing: &Missing<L, P, B>) -> Result<Way<V>>
    where
        L: Fn() -> Option<V>,
        P: Fn() -> Result<OwnedSemaphorePermit>,
        B: Fn() -> (R, A),
        R: Future<Output = Result<V>> + Send + 'static,
        A: FnOnce(&V) -> bool + Send + 'static,
    {
        let mut flights = self.0.lock();
        if let Some(flight) = flights.get(key) {
            return Ok(Way::Flight(flight.clone(), false));
        }
        if let Some(value) = (missing.look)() {
            return Ok(Way::Known(value));
        }
        let permit = (missing.permit)()?;
        let (landing, flight) = watch::channel(None);
        flights.insert(key.clone(), flight.clone());
        let entry = Entry { flights: Arc::clone(self), key: key.clone(), is_in_the_list: true };
        let (read, admit) = (missing.begin)();
        // On its own, so that the others get their answer even if the first to ask goes away.
        tokio::spawn(async move {
            let outcome = match read.await {
                Err(error) => {
                    drop(entry);
                    Landing::Failed(Arc::new(error))
                }
                Ok(value) if entry.land(|| admit(&value)) => Landing::Admitted(value),
                Ok(value) => Landing::Overtaken(value),
            };
            drop(permit);
            landing.send_replace(Some(outcome));
        });
        Ok(Way::Flight(flight, true))
    }
}

/// What a flight brings; nothing if it is not for this call, or came down without landing.
async fn land<V: Clone>(mut flight: Waiting<V>, overtaken_too: bool) -> Result<Option<V>> {
    match flight.wait_for(Option::is_some).await.ok().and_then(|landing| landing.clone()) {
        Some(Landing::Admitted(value)) => Ok(Some(value)),
        Some(Landing::Overtaken(value)) if overtaken_too => Ok(Some(value)),
        Some(Landing::Failed(error)) => Err(shared(&error)),
        Some(Landing::Overtaken(_)) | None => Ok(None),
    }
}

/// The same failure for everybody who waited.
fn shared(error: &Arc<Error>) -> Error {
    match error.as_ref() {
        Error::Overloaded(text) => Error::Overloaded(text),
        Error::Unavailable(_) => Error::Unavailable(Box::new(Arc::clone(error))),
        _ => Error::Internal(Box::new(Arc::clone(error))),
    }
}
