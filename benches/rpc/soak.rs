//! `--soak SECONDS`: full load while tokens come and go. Memory is watched, and in the end every use must have been counted, to the last call.

use std::{
    collections::{BTreeMap, HashMap},
    process::{Command, Stdio},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use keyward::proto::{self, token_service_client::TokenServiceClient, validation_service_client::ValidationServiceClient};
use tokio::task::JoinSet;
use tonic::{Request, transport::Channel};

use crate::{
    client::{CONNECTIONS, UNDER_WAY, Wire, question},
    process::{CLIENT_CORE, Keyward, Settings},
    site::{Site, Stored, database, fill, rows},
    wire,
};

/// Tokens that live through all of it.
const LASTING: usize = 1_000;
/// Places of tokens that come and go. Half of those in them have ended, and are asked about all the same.
const PASSING: usize = 64;
const CHURN_INTERVAL: Duration = Duration::from_millis(50);
const SAMPLE_INTERVAL: Duration = Duration::from_secs(10);
/// So many samples at least, however short it is.
const SAMPLES_MIN: u32 = 20;

/// A token with what the client knows of it.
struct Known {
    id: String,
    secret: String,
    message: Vec<u8>,
    /// Answers that said `valid`.
    used: AtomicU64,
    /// Set when the call that ended it has returned.
    has_ended: AtomicBool,
    is_lasting: bool,
}

impl Known {
    fn new(stored: Stored, is_lasting: bool) -> Arc<Self> {
        let message = wire::framed(&question(&stored.secret));
        let (used, has_ended) = (AtomicU64::new(0), AtomicBool::new(false));
        Arc::new(Self { id: stored.id, secret: stored.secret, message, used, has_ended, is_lasting })
    }

    /// Takes an answer to a question that was sent when the token had ended, or had not.
    fn take(&self, is_valid: bool, had_ended: bool) {
        assert!(is_valid || !self.is_lasting, "{} was refused, and should be good", self.id);
        assert!(!is_valid || !had_ended, "{} was found valid after its end", self.id);
        self.used.fetch_add(u64::from(is_valid), Ordering::Relaxed);
    }
}

/// What the clients share.
struct Soak {
    port: u16,
    site: Site,
    /// Those that are asked about, in turns.
    pool: Mutex<Vec<Arc<Known>>>,
    next: AtomicU64,
    /// Everything that there has been.
    all: Mutex<Vec<Arc<Known>>>,
    /// Calls made with the caller's token.
    calls: AtomicU64,
    is_over: AtomicBool,
}

impl Soak {
    fn next_token(&self) -> Arc<Known> {
        let pool = self.pool.lock().expect("whole");
        let index = self.next.fetch_add(1, Ordering::Relaxed) as usize % pool.len();
        Arc::clone(&pool[index])
    }

    fn is_over(&self) -> bool {
        self.is_over.load(Ordering::Relaxed)
    }

    /// Full load on one connection, until it is over and everything is answered.
    async fn load(self: Arc<Self>) {
        let mut wire = Wire::connect(self.port, wire::VALIDATE, &self.site.caller).await;
        let (mut asked, mut tag) = (HashMap::new(), 0);
        loop {
            while !self.is_over() && wire.line.under_way() < UNDER_WAY && wire.line.has_room() {
                let token = self.next_token();
                tag += 1;
                wire.line.call(tag, &token.message);
                let had_ended = token.has_ended.load(Ordering::Relaxed);
                asked.insert(tag, (token, had_ended));
            }
            if wire.line.under_way() == 0 && self.is_over() {
                return;
            }
            if wire.line.under_way() == 0 && wire.line.is_closing() {
                // Servers close connections after an hour.
                wire = Wire::connect(self.port, wire::VALIDATE, &self.site.caller).await;
                continue;
            }
            wire.turn(|tag, received, has_ended| {
                if has_ended {
                    let (token, had_ended): (Arc<Known>, bool) = asked.remove(&tag).expect("asked");
                    let (answer, _) = wire::unframed(received).expect("an answer, not an error");
                    token.take(wire::says_valid(answer), had_ended);
                    self.calls.fetch_add(1, Ordering::Relaxed);
                }
            })
            .await;
        }
    }

    /// Tokens come, are used, and go: by turns revoked and deleted.
    async fn churn(self: Arc<Self>, channel: Channel) {
        let mut number = 0;
        while !self.is_over() {
            let token = self.create(&channel, number).await;
            for _ in 0..3 {
                self.ask(&channel, &token).await;
            }
            let place = |number: usize| LASTING + number % PASSING;
            let old = {
                let mut pool = self.pool.lock().expect("whole");
                pool[place(number)] = token;
                Arc::clone(&pool[place(number + PASSING / 2)])
            };
            if !old.is_lasting {
                self.end(&channel, &old, number.is_multiple_of(2)).await;
                self.ask(&channel, &old).await;
            }
            number += 1;
            tokio::time::sleep(CHURN_INTERVAL).await;
        }
    }

    async fn create(&self, channel: &Channel, number: usize) -> Arc<Known> {
        let wish = proto::CreateTokenRequest {
            display_name: format!("passing {number}"),
            principal: format!("passing-{}", number % PASSING),
            scopes: vec!["agents:list".to_owned()],
            audiences: vec!["billing".to_owned()],
            ..Default::default()
        };
        let created = TokenServiceClient::new(channel.clone()).create_token(request(wish, &self.site.root)).await;
        let created = created.expect("created").into_inner();
        let token = Known::new(Stored { id: created.token.expect("a token").id, secret: created.secret }, false);
        self.all.lock().expect("whole").push(Arc::clone(&token));
        token
    }

    async fn ask(&self, channel: &Channel, token: &Known) {
        let message = proto::ValidateTokenRequest { token: token.secret.clone(), audience: "billing".to_owned(), ..Default::default() };
        let had_ended = token.has_ended.load(Ordering::Relaxed);
        let answer = ValidationServiceClient::new(channel.clone()).validate_token(request(message, &self.site.caller)).await;
        token.take(answer.expect("an answer").into_inner().valid, had_ended);
        self.calls.fetch_add(1, Ordering::Relaxed);
    }

    async fn end(&self, channel: &Channel, token: &Known, is_deleted: bool) {
        let (mut client, id) = (TokenServiceClient::new(channel.clone()), token.id.clone());
        if is_deleted {
            client.delete_token(request(proto::DeleteTokenRequest { id, ..Default::default() }, &self.site.root)).await.expect("deleted");
        } else {
            client.revoke_token(request(proto::RevokeTokenRequest { id, ..Default::default() }, &self.site.root)).await.expect("revoked");
        }
        token.has_ended.store(true, Ordering::Relaxed);
    }
}

fn request<T>(message: T, token: &str) -> Request<T> {
    let mut request = Request::new(message);
    request.metadata_mut().insert("authorization", format!("Bearer {token}").parse().expect("text"));
    request
}

async fn connect(keyward: &Keyward) -> Channel {
    let address = format!("http://127.0.0.1:{}", keyward.server.port);
    Channel::from_shared(address).expect("an address").connect().await.expect("a connection")
}

/// Returns whether every use was counted.
pub fn run(seconds: u64, site: Site) -> bool {
    // The load comes from this process: it keeps off the server's core, as every thread that it starts from now on.
    let own = std::process::id().to_string();
    let pinned = Command::new("taskset").args(["-a", "-p", "-c", CLIENT_CORE, &own]).stdout(Stdio::null()).status();
    assert!(pinned.expect("taskset").success(), "the client could not be pinned");
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    runtime.block_on(soak(Duration::from_secs(seconds), site))
}

async fn soak(length: Duration, site: Site) -> bool {
    let folder = site.copy("soak");
    let lasting: Vec<_> = fill(&folder, LASTING).await.into_iter().map(|stored| Known::new(stored, true)).collect();
    let keyward = Keyward::start(&folder, &Settings::default());
    // The places of passing tokens begin with lasting ones.
    let pool = lasting.iter().chain(lasting.iter().take(PASSING)).cloned().collect();
    let shared = Arc::new(Soak {
        port: keyward.server.port,
        site,
        pool: Mutex::new(pool),
        next: AtomicU64::new(0),
        all: Mutex::new(lasting),
        calls: AtomicU64::new(0),
        is_over: AtomicBool::new(false),
    });
    let mut tasks = JoinSet::new();
    for _ in 0..CONNECTIONS {
        tasks.spawn(Arc::clone(&shared).load());
    }
    let channel = connect(&keyward).await;
    tasks.spawn(Arc::clone(&shared).churn(channel));
    let memory = watch(&keyward, length, &mut tasks).await;
    shared.is_over.store(true, Ordering::Relaxed);
    tasks.join_all().await;
    let at = |share: f64| memory[((memory.len() - 1) as f64 * share).round() as usize];
    let (calls, tokens) = (shared.calls.load(Ordering::Relaxed), shared.all.lock().expect("whole").len());
    println!("## Soak: {} s of full load, {LASTING} lasting tokens, {} that came and went\n", length.as_secs(), tokens - LASTING);
    println!("memory of the server: {:.0} MiB at 10 %, {:.0} MiB at 50 %, {:.0} MiB at the end", at(0.1), at(0.5), at(1.0));
    println!("calls: {calls} ({:.0} a second)", calls as f64 / length.as_secs_f64());
    keyward.server.stop();
    let wrong = miscounted(&folder, &shared).await;
    wrong.iter().take(10).for_each(|line| println!("{line}"));
    let uses: u64 = shared.all.lock().expect("whole").iter().map(|token| token.used.load(Ordering::Relaxed)).sum();
    println!("counts exact: {} ({uses} uses of {tokens} tokens, and {calls} of the caller's)", if wrong.is_empty() { "yes" } else { "no" });
    wrong.is_empty()
}

/// The server's memory, from time to time, until the time is over. A client that fails ends the bench at once.
async fn watch(keyward: &Keyward, length: Duration, tasks: &mut JoinSet<()>) -> Vec<f64> {
    let (begin, mut memory) = (Instant::now(), Vec::new());
    let interval = SAMPLE_INTERVAL.min(length / SAMPLES_MIN);
    while begin.elapsed() < length {
        tokio::select! {
            () = tokio::time::sleep(interval) => memory.push(keyward.server.rss()),
            Some(ended) = tasks.join_next() => ended.expect("the client goes on"),
        }
    }
    memory
}

/// Starts the server once more, and compares what it has stored with what the clients counted. A sentence for each difference.
async fn miscounted(folder: &std::path::Path, shared: &Soak) -> Vec<String> {
    // Deleted tokens are shown by no call.
    let db = database(folder).await;
    let deleted = rows(&db, "SELECT id, use_count FROM token JOIN token_usage ON token_id = id WHERE delete_time IS NOT NULL").await;
    let column = |row: &sea_orm::QueryResult| (row.try_get_by_index(0).expect("an id"), row.try_get_by_index(1).expect("a count"));
    let mut stored: BTreeMap<String, i64> = deleted.iter().map(column).collect();
    db.close().await.expect("closed");
    let keyward = Keyward::start(folder, &Settings::default());
    let mut client = TokenServiceClient::new(connect(&keyward).await);
    let (mut page_token, mut callers) = (String::new(), Vec::new());
    loop {
        let message = proto::ListTokensRequest { page_size: 1_000, page_token, ..Default::default() };
        let page = client.list_tokens(request(message, &shared.site.root)).await.expect("a page").into_inner();
        for token in page.tokens {
            if token.scopes == ["keyward:validate"] {
                callers.push(token.use_count);
            }
            stored.insert(token.id, token.use_count);
        }
        page_token = page.next_page_token;
        if page_token.is_empty() {
            break;
        }
    }
    let mut wrong = Vec::new();
    for token in shared.all.lock().expect("whole").iter() {
        let (counted, stored) = (token.used.load(Ordering::Relaxed), stored.get(&token.id).copied().unwrap_or(0));
        if i64::try_from(counted) != Ok(stored) {
            wrong.push(format!("{}: {counted} uses were made, {stored} are stored", token.id));
        }
    }
    let calls = shared.calls.load(Ordering::Relaxed);
    if callers != [i64::try_from(calls).expect("small")] {
        wrong.push(format!("the caller: {calls} calls were made, {callers:?} are stored"));
    }
    wrong
}
