//! Many tokens: in batches, and on streams.

use keyward::proto;
use tonic::{Code, transport::Channel};

use crate::{
    Options,
    calls::start_empty,
    process::{CLIENT_CORE, Client, Keyward, Server, Settings},
    site::{Site, fill},
    stats::{Spread, print_table},
    wire,
};

const BATCH: &str = "batch 100";
const STREAM: &str = "stream";

/// Who is asked and how, and what it took in each round: nanoseconds of the server's CPU a token.
struct Row {
    name: &'static str,
    order: &'static str,
    is_counted: bool,
    /// Whether Keyward is asked, not the server that does nothing.
    is_ours: bool,
    samples: Vec<f64>,
}

fn row(name: &'static str, order: &'static str, is_counted: bool) -> Row {
    Row { name, order, is_counted, is_ours: true, samples: Vec::new() }
}

fn rows() -> [Row; 5] {
    [
        Row { is_ours: false, ..row("tonic, a stream whose handler does nothing", STREAM, false) },
        row("Keyward, `StreamValidateTokens`, peek", STREAM, false),
        row("Keyward, `StreamValidateTokens`, uses counted and written", STREAM, true),
        row("Keyward, `BatchValidateTokens` of 100, peek", BATCH, false),
        row("Keyward, `BatchValidateTokens` of 100, uses counted and written", BATCH, true),
    ]
}

/// The servers, and who asks them.
struct Place {
    keyward: Keyward,
    client: Client,
    empty: Server,
    empty_client: Client,
    tokens: usize,
}

/// Measures, and prints the table.
pub fn compare(options: &Options, site: &Site, runtime: &tokio::runtime::Runtime) {
    let folder = site.copy("many");
    let stored = runtime.block_on(fill(&folder, options.tokens));
    let tokens = site.tokens("many.tokens", &stored.into_iter().map(|stored| stored.secret).collect::<Vec<_>>());
    let keyward = Keyward::start(&folder, &Settings::default());
    let empty = start_empty(site, "tonic-multi", None);
    let client = |port| Client::start(CLIENT_CORE, port, &site.caller, &tokens);
    let (ours, others) = (client(keyward.server.port), client(empty.port));
    let streams = runtime.block_on(is_served(&keyward, &site.caller));
    let mut place = Place { keyward, client: ours, empty, empty_client: others, tokens: options.tokens };
    let mut rows: Vec<Row> = rows().into_iter().filter(|row| streams || !row.is_ours || row.order != STREAM).collect();
    // The first pass reads every token from the database.
    let cold = place.round(&row("", BATCH, false));
    for round in 0..=options.few_rounds() {
        for turn in 0..rows.len() {
            let count = rows.len();
            let row = &mut rows[(turn + round) % count];
            let sample = place.round(row);
            row.samples.extend(Some(sample).filter(|_| round > 0));
        }
    }
    println!("## Many tokens: {} different ones, one core, {} rounds over all of them\n", options.tokens, options.few_rounds());
    print(&rows, cold, streams);
    println!("Memory of the server with all of them: {:.0} MiB\n", place.keyward.server.rss());
}

fn print(rows: &[Row], cold: f64, streams: bool) {
    let mut cells = Vec::new();
    for row in rows {
        let spread = Spread::of(row.samples.iter().copied());
        let ratio = Spread::of_ratios(&row.samples, &rows[0].samples).median;
        cells.push(vec![row.name.to_owned(), spread.show(0), format!("{ratio:.2}"), format!("{:.0}", 1e9 / spread.median)]);
    }
    let once = "Keyward, the first pass, which reads them from the database (once)";
    cells.push(vec![once.to_owned(), format!("{cold:.0}"), String::new(), format!("{:.0}", 1e9 / cold)]);
    if !streams {
        cells.push(vec!["Keyward, `StreamValidateTokens`".to_owned(), "not served".to_owned(), String::new(), String::new()]);
    }
    print_table(&["answers", "server CPU ns per token (median, min–max)", "ratio to the first", "tokens per second of CPU"], &cells);
}

impl Place {
    fn round(&mut self, row: &Row) -> f64 {
        let server = if row.is_ours { &self.keyward.server } else { &self.empty };
        let client = if row.is_ours { &mut self.client } else { &mut self.empty_client };
        let (judged, before) = (self.keyward.verdicts("VALID"), server.cpu());
        let answer = client.run(&format!("{} {}", row.order, if row.is_counted { "count" } else { "peek" }));
        if row.is_counted {
            // Uses are written after the answers, and cost the server as well.
            server.settle();
        }
        let cpu = server.cpu() - before;
        assert_eq!((answer[0] as usize, answer[1] as usize), (self.tokens, self.tokens), "answers, and good ones, to {}", row.order);
        let judged = self.keyward.verdicts("VALID") - judged;
        assert_eq!(judged as usize, if row.is_ours { self.tokens } else { 0 }, "tokens that were judged VALID");
        cpu / self.tokens as f64
    }
}

/// Whether this server has the streaming call. It is not among the generated ones of every version.
async fn is_served(keyward: &Keyward, caller: &str) -> bool {
    let address = format!("http://127.0.0.1:{}", keyward.server.port);
    let channel = Channel::from_shared(address).expect("an address").connect().await.expect("a connection");
    let mut grpc = tonic::client::Grpc::new(channel);
    grpc.ready().await.expect("a connection");
    let mut request = tonic::Request::new(proto::ValidateTokenRequest::default());
    request.metadata_mut().insert("authorization", format!("Bearer {caller}").parse().expect("text"));
    let codec = tonic_prost::ProstCodec::<proto::ValidateTokenRequest, ()>::default();
    let outcome = grpc.unary(request, http::uri::PathAndQuery::from_static(wire::STREAM), codec).await;
    !outcome.is_err_and(|status| status.code() == Code::Unimplemented)
}
