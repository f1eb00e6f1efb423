//! A TCP proxy that stands between a server and its database, to cut and delay what passes.

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{
        TcpListener, TcpStream,
        tcp::{OwnedReadHalf, OwnedWriteHalf},
    },
    sync::watch,
};

/// What the proxy does to what passes.
#[derive(Default)]
struct Orders {
    /// New connections are refused, open ones are cut.
    cut: AtomicBool,
    /// The first connection that sends these bytes has its replies held.
    hold: Mutex<Option<Vec<u8>>>,
    /// What holds these bytes is not passed on.
    stop: Mutex<Option<Vec<u8>>>,
    /// Something is held.
    holding: AtomicBool,
    /// Milliseconds that replies take longer.
    delay: AtomicU64,
}

/// The proxy.
pub struct Proxy {
    pub port: u16,
    orders: Arc<Orders>,
    release: watch::Sender<bool>,
    release_requests: watch::Sender<bool>,
    kill: watch::Sender<u64>,
}

impl Proxy {
    /// Passes everything on to this port of this machine.
    pub async fn start(target: u16) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let port = listener.local_addr().expect("an address").port();
        let orders = Arc::new(Orders::default());
        let (release, released) = watch::channel(false);
        let (release_requests, requests_released) = watch::channel(false);
        let (kill, killed) = watch::channel(0);
        let proxy = Self { port, orders: Arc::clone(&orders), release, release_requests, kill };
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                if orders.cut.load(Ordering::SeqCst) {
                    continue;
                }
                let (orders, mut killed) = (Arc::clone(&orders), killed.clone());
                let released = (requests_released.clone(), released.clone());
                tokio::spawn(async move {
                    let Ok(server) = TcpStream::connect(("127.0.0.1", target)).await else { return };
                    let generation = *killed.borrow_and_update();
                    tokio::select! {
                        () = pass(client, server, orders, released) => {}
                        _ = killed.wait_for(|now| *now != generation) => {}
                    }
                });
            }
        });
        proxy
    }

    /// Cuts every connection and lets none through any more.
    pub fn cut(&self) {
        self.orders.cut.store(true, Ordering::SeqCst);
        self.kill.send_modify(|generation| *generation += 1);
    }

    /// Has each reply take so much longer.
    pub fn delay(&self, span: Duration) {
        self.orders.delay.store(u64::try_from(span.as_millis()).expect("not that long"), Ordering::SeqCst);
    }

    /// Lets connections through again, and at once.
    pub fn heal(&self) {
        self.orders.cut.store(false, Ordering::SeqCst);
        self.delay(Duration::ZERO);
    }

    /// Holds the replies of the first connection that sends these bytes, until [`Proxy::release`].
    pub fn hold_after(&self, bytes: Vec<u8>) {
        self.release.send_replace(false);
        self.orders.holding.store(false, Ordering::SeqCst);
        *self.orders.hold.lock().expect("not poisoned") = Some(bytes);
    }

    /// Holds the first request that holds these bytes, until [`Proxy::release`].
    pub fn hold_before(&self, bytes: Vec<u8>) {
        self.release_requests.send_replace(false);
        self.orders.holding.store(false, Ordering::SeqCst);
        *self.orders.stop.lock().expect("not poisoned") = Some(bytes);
    }

    pub fn is_holding(&self) -> bool {
        self.orders.holding.load(Ordering::SeqCst)
    }

    pub fn release(&self) {
        self.release_requests();
        self.release.send_replace(true);
    }

    /// Lets requests go on, and goes on holding replies.
    pub fn release_requests(&self) {
        self.release_requests.send_replace(true);
    }
}

async fn pass(client: TcpStream, server: TcpStream, orders: Arc<Orders>, released: (watch::Receiver<bool>, watch::Receiver<bool>)) {
    let (client_read, client_write) = client.into_split();
    let (server_read, server_write) = server.into_split();
    let held = Arc::new(AtomicBool::new(false));
    tokio::select! {
        () = requests(client_read, server_write, Arc::clone(&orders), Arc::clone(&held), released.0) => {}
        () = replies(server_read, client_write, orders, held, released.1) => {}
    }
}

async fn requests(
    mut from: OwnedReadHalf,
    mut to: OwnedWriteHalf,
    orders: Arc<Orders>,
    held: Arc<AtomicBool>,
    mut released: watch::Receiver<bool>,
) {
    let mut buffer = vec![0; 65_536];
    while let Ok(count @ 1..) = from.read(&mut buffer).await {
        let passing = &buffer[..count];
        if take(&orders.hold, passing) {
            held.store(true, Ordering::SeqCst);
            orders.holding.store(true, Ordering::SeqCst);
        }
        if take(&orders.stop, passing) {
            orders.holding.store(true, Ordering::SeqCst);
            if released.wait_for(|released| *released).await.is_err() {
                return;
            }
        }
        if to.write_all(&buffer[..count]).await.is_err() {
            return;
        }
    }
}

/// Whether what passes is what is waited for, which is then waited for no longer.
fn take(wanted: &Mutex<Option<Vec<u8>>>, passing: &[u8]) -> bool {
    let mut wanted = wanted.lock().expect("not poisoned");
    wanted.take_if(|bytes| passing.windows(bytes.len()).any(|window| window == bytes)).is_some()
}

async fn replies(
    mut from: OwnedReadHalf,
    mut to: OwnedWriteHalf,
    orders: Arc<Orders>,
    held: Arc<AtomicBool>,
    mut released: watch::Receiver<bool>,
) {
    let mut buffer = vec![0; 65_536];
    while let Ok(count @ 1..) = from.read(&mut buffer).await {
        if held.load(Ordering::SeqCst) && released.wait_for(|released| *released).await.is_err() {
            return;
        }
        let delay = Duration::from_millis(orders.delay.load(Ordering::SeqCst));
        if !delay.is_zero() {
            tokio::time::sleep(delay).await;
        }
        if to.write_all(&buffer[..count]).await.is_err() {
            return;
        }
    }
}
