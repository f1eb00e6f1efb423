//! Many tokens: in batches, and on streams.

use keyward::proto;
use tonic::{Code, transport::Channel};

use crate::{
    Options,
    process::{CLIENT_CORE, Client, Keyward, Settings},
    site::{Site, fill},
    stats::{Spread, print_table},
    wire,
};

const BATCH: &str = "batch 100";
const STREAM: &str = "stream";

/// How it is asked, and what it took in each round: nanoseconds of the server's CPU a token.
struct Row {
    order: &'static str,
    is_counted: bool,
    samples: Vec<f64>,
}

/// Measures, and prints the table.
pub fn compare(options: &Options, site: &Site, runtime: &tokio::runtime::Runtime) {
    let folder = site.copy("many");
    let stored = runtime.block_on(fill(&folder, options.tokens));
    let secrets: Vec<String> = stored.into_iter().map(|stored| stored.secret).collect();
    let tokens = site.tokens("many.tokens", &secrets);
    drop(secrets);
    let keyward = Keyward::start(&folder, &Settings::default());
    let streams = runtime.block_on(is_served(&keyward, &site.caller));
    let mut client = Client::start(CLIENT_CORE, keyward.server.port, &site.caller, &tokens);
    let mut rows: Vec<Row> = [(BATCH, false), (BATCH, true), (STREAM, false), (STREAM, true)]
        .into_iter()
        .filter(|(order, _)| streams || *order != STREAM)
        .map(|(order, is_counted)| Row { order, is_counted, samples: Vec::new() })
        .collect();
    // The first pass reads every token from the database.
    let cold = rows[0].round(&keyward, &mut client, options.tokens);
    for round in 0..=options.rounds {
        for turn in 0..rows.len() {
            let count = rows.len();
            let row = &mut rows[(turn + round) % count];
            let sample = row.round(&keyward, &mut client, options.tokens);
            row.samples.extend(Some(sample).filter(|_| round > 0));
        }
    }
    println!("## Many tokens: {} different ones, one core, {} rounds over all of them\n", options.tokens, options.rounds);
    let name = |row: &Row| if row.order == STREAM { "`StreamValidateTokens`" } else { "`BatchValidateTokens` of 100" };
    let counted = |row: &Row| if row.is_counted { "uses counted and written" } else { "peek" };
    let mut cells: Vec<_> = rows
        .iter()
        .map(|row| {
            let spread = Spread::of(row.samples.iter().copied());
            vec![format!("{}, {}", name(row), counted(row)), spread.show(0), format!("{:.0}", 1e9 / spread.median)]
        })
        .collect();
    cells.push(vec!["the first pass, which reads them from the database".to_owned(), format!("{cold:.0}"), format!("{:.0}", 1e9 / cold)]);
    if !streams {
        cells.push(vec!["`StreamValidateTokens`".to_owned(), "not served".to_owned(), String::new()]);
    }
    print_table(&["asked by", "server CPU ns per token (median, min–max)", "tokens per second of CPU"], &cells);
    println!("Memory of the server with all of them: {:.0} MiB\n", keyward.server.rss());
}

impl Row {
    fn round(&self, keyward: &Keyward, client: &mut Client, tokens: usize) -> f64 {
        let (judged, before) = (keyward.verdicts("VALID"), keyward.server.cpu());
        let answer = client.run(&format!("{} {}", self.order, if self.is_counted { "count" } else { "peek" }));
        if self.is_counted {
            // Uses are written after the answers, and cost the server as well.
            keyward.server.settle();
        }
        let cpu = keyward.server.cpu() - before;
        assert_eq!((answer[0] as usize, answer[1] as usize), (tokens, tokens), "answers, and good ones, to {}", self.order);
        assert_eq!(keyward.verdicts("VALID") - judged, tokens as u64, "tokens that were judged VALID");
        cpu / tokens as f64
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
