//! The threads of the data plane: each drives its connections on a runtime of its own.
//!
//! What these threads cannot answer at once they hand to the runtime that the server was started on, where the store is.
//!
//! Invariant: connections are handed round evenly (test `connections_are_spread_over_the_workers`).

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use tokio::{
    net::TcpStream,
    sync::{OwnedSemaphorePermit, mpsc},
    task::JoinSet,
};

use super::connection::Port;

/// Connections that may wait for a worker to take them up.
const WAITING_MAX: usize = 128;

/// A connection on its way to a worker: no runtime knows its socket.
struct Accepted {
    stream: std::net::TcpStream,
    address: SocketAddr,
    permit: OwnedSemaphorePermit,
}

struct Worker {
    line: mpsc::Sender<Accepted>,
    open: Arc<AtomicUsize>,
}

/// The workers of one port. They end when this is dropped and their connections have closed.
pub(super) struct Workers(Vec<Worker>);

impl Workers {
    /// Starts so many.
    ///
    /// # Errors
    /// A sentence, if the operating system gives no thread.
    pub(super) fn start(count: usize, port: &Arc<Port>) -> Result<Self, String> {
        let start = |number| Worker::start(number, Arc::clone(port)).map_err(|error| format!("a worker thread cannot be started: {error}"));
        (0..count).map(start).collect::<Result<_, _>>().map(Self)
    }

    /// Gives a connection to the worker that has the fewest.
    pub(super) async fn hand(&self, stream: TcpStream, address: SocketAddr, permit: OwnedSemaphorePermit) -> std::io::Result<()> {
        let accepted = Accepted { stream: stream.into_std()?, address, permit };
        if let Some(worker) = self.0.iter().min_by_key(|worker| worker.open.load(Ordering::Relaxed)) {
            worker.open.fetch_add(1, Ordering::Relaxed);
            worker.line.send(accepted).await.map_err(|_| std::io::Error::other("the worker is gone"))?;
        }
        Ok(())
    }
}

impl Worker {
    fn start(number: usize, port: Arc<Port>) -> std::io::Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let (line, accepted) = mpsc::channel(WAITING_MAX);
        let open = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&open);
        let work = move || runtime.block_on(drive(&port, accepted, &count));
        std::thread::Builder::new().name(format!("keyward-{number}")).spawn(work)?;
        Ok(Self { line, open })
    }
}

/// Takes up connections until no more will come, and drives each to its end.
async fn drive(port: &Arc<Port>, mut line: mpsc::Receiver<Accepted>, open: &AtomicUsize) {
    let mut connections = JoinSet::new();
    loop {
        let accepted = tokio::select! {
            accepted = line.recv() => accepted,
            Some(_) = connections.join_next() => {
                open.fetch_sub(1, Ordering::Relaxed);
                continue;
            }
        };
        let Some(Accepted { stream, address, permit }) = accepted else { break };
        match TcpStream::from_std(stream) {
            Ok(stream) => {
                connections.spawn(Arc::clone(port).serve(stream, address, permit));
            }
            Err(error) => {
                open.fetch_sub(1, Ordering::Relaxed);
                tracing::warn!(%error, "a connection could not be taken up");
            }
        }
    }
    while connections.join_next().await.is_some() {}
}

#[cfg(test)]
mod tests {
    use tokio::{net::TcpListener, sync::Semaphore};

    use super::*;

    #[tokio::test]
    async fn connections_are_spread_over_the_workers() {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("an address");
        let places = Arc::new(Semaphore::new(100));
        let (workers, mut lines): (Vec<_>, Vec<_>) = std::iter::repeat_with(|| {
            let (line, accepted) = mpsc::channel(WAITING_MAX);
            (Worker { line, open: Arc::default() }, accepted)
        })
        .take(3)
        .unzip();
        let workers = Workers(workers);
        let hand = async || {
            let _client = TcpStream::connect(address).await.expect("connected");
            let (stream, address) = listener.accept().await.expect("accepted");
            let permit = Arc::clone(&places).acquire_owned().await.expect("a place");
            workers.hand(stream, address, permit).await.expect("handed on");
        };
        for _ in 0..9 {
            hand().await;
        }
        assert_eq!(lines.iter().map(mpsc::Receiver::len).collect::<Vec<_>>(), [3, 3, 3]);
        workers.0[1].open.fetch_sub(2, Ordering::Relaxed);
        for _ in 0..2 {
            hand().await;
        }
        assert_eq!(lines.iter().map(mpsc::Receiver::len).collect::<Vec<_>>(), [3, 5, 3], "two of its connections had closed");
        let accepted = lines[1].recv().await.expect("handed on");
        assert!(TcpStream::from_std(accepted.stream).is_ok(), "another runtime may take it up");
    }
}
