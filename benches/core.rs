//! What judging a token costs without the wire, by how many tokens there are: parse, hash, look up, judge, count the use.
//!
//! `cargo bench --bench core` fills the cache with 1 thousand to 10 million tokens (`-- --tokens 1000000`: to one million), asks about them in random
//! order, one by one and in groups of 64 that are looked up together, and prints nanoseconds per token: the median of the rounds and their spread.
//! It writes the same as a plot to `benches/core.svg`. The texts lie in the order in which they are asked, as they do when they have just been received.

#![allow(
    clippy::disallowed_methods,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout,
    clippy::indexing_slicing,
    clippy::cast_precision_loss,
    missing_docs,
    reason = "a bench fails by panicking, and speaks to people"
)]

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    fs,
    hint::black_box,
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use keyward::{
    ambient::{Stopwatch, Time},
    cache::{Cache, Fact},
    grant::{Facts, Grant, Kind, Need, State, Verdict},
    store::{DatabaseUrl, Store},
    token::{Digest, Keyring, TokenId},
    usage::Usage,
    validator::{Question, Validator},
};

const POPULATIONS: [usize; 5] = [1_000, 10_000, 100_000, 1_000_000, 10_000_000];
const ROUNDS: usize = 7;
const LEASE: Duration = Duration::from_hours(1);
/// Questions of one round.
const QUESTIONS: usize = 200_000;
const GROUP: usize = 64;
/// Of the cache: somewhat more than a token takes, so that most of them stay.
const BYTES_PER_TOKEN: usize = 240;
const NOW: Time = Time::from_micros(1_800_000_000_000_000);

/// Nanoseconds per token.
#[derive(Clone, Copy)]
struct Cost {
    median: f64,
    min: f64,
    max: f64,
}

impl Cost {
    fn of(mut rounds: Vec<f64>) -> Self {
        rounds.sort_by(f64::total_cmp);
        Self { median: rounds[rounds.len() / 2], min: rounds[0], max: rounds[rounds.len() - 1] }
    }
}

impl std::fmt::Display for Cost {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:.0} ({:.0}–{:.0})", self.median, self.min, self.max)
    }
}

/// What one population costs.
struct Row {
    tokens: usize,
    single: Cost,
    grouped: Cost,
    invented: Cost,
    bytes: f64,
    /// The share of them that memory has kept.
    known: f64,
}

/// Texts one behind the other.
struct Texts(Vec<[u8; 64]>, usize);

impl Texts {
    fn iter(&self) -> impl Iterator<Item = &[u8]> {
        self.0.iter().map(|text| &text[..self.1])
    }

    fn push(&mut self, text: &[u8]) {
        let mut padded = [0; 64];
        padded[..text.len()].copy_from_slice(text);
        self.0.push(padded);
        self.1 = text.len();
    }
}

/// A small generator of random numbers (Steele and others, "Fast splittable pseudorandom number generators", 2014): the same order in each run.
struct Dice(u64);

impl Dice {
    fn below(&mut self, bound: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        usize::try_from((mixed ^ (mixed >> 31)) % bound as u64).expect("below")
    }
}

fn facts() -> Facts {
    Facts {
        token_id: TokenId::new(NOW).expect("randomness"),
        workspace: "default".to_owned(),
        principal: "alice".to_owned(),
        kind: Kind::Permanent,
        state: State::Active,
        scopes: ["agents:list", "storage:upload"].map(|scope| scope.parse().expect("a scope")).to_vec(),
        audiences: vec!["billing".to_owned()],
        allowed_cidrs: Vec::new(),
        display_name: "bench".to_owned(),
        metadata: BTreeMap::new(),
        expire_time: Time::NEVER,
        secret_expire_time: Time::NEVER,
        principal_suspended: false,
        principal_is_admin: false,
        workspace_suspended: false,
    }
}

fn question(text: &[u8]) -> Question<'_> {
    let need = Need { workspace: Some("default"), audience: Some("billing"), scopes: &["agents:list"], ..Need::default() };
    Question { text, need, http: None, peek: false }
}

/// Looks up, judges and counts the use.
fn ask(validator: &Validator, digest: Option<Digest>, question: &Question<'_>) -> Verdict {
    let judged = validator.judge_known(digest, question, NOW, |judgement| {
        if let Some(token_id) = judgement.used(question) {
            validator.count(token_id, question.need.client_ip, NOW);
        }
        black_box(judgement).verdict
    });
    judged.expect("known")
}

/// One at a time.
fn ask_each(validator: &Validator, texts: &Texts, expected: Verdict) -> f64 {
    let begin = Instant::now();
    for text in texts.iter() {
        let question = question(text);
        assert_eq!(ask(validator, validator.prove(text), &question), expected);
    }
    begin.elapsed().as_secs_f64() * 1e9 / texts.0.len() as f64
}

/// As a batch does.
fn ask_together(validator: &Validator, texts: &Texts) -> f64 {
    let begin = Instant::now();
    for group in texts.0.chunks(GROUP) {
        let texts = group.iter().map(|text| &text[..texts.1]);
        let digests: Vec<Option<Digest>> = texts.clone().map(|text| validator.prove(text)).collect();
        validator.bring_near(digests.iter().copied().flatten());
        for (text, digest) in texts.zip(digests) {
            let question = question(text);
            assert_eq!(ask(validator, digest, &question), Verdict::Valid);
        }
    }
    begin.elapsed().as_secs_f64() * 1e9 / texts.0.len() as f64
}

/// Makes so many tokens and keeps their facts.
fn fill(tokens: usize, keyring: &Keyring, cache: &Cache) -> Texts {
    let prefix = "kw".parse().expect("a prefix");
    let mut texts = Texts(Vec::with_capacity(tokens), 0);
    for _ in 0..tokens {
        let issued = keyring.issue(&prefix).expect("randomness");
        texts.push(issued.secret.reveal().as_bytes());
        assert!(cache.admit(issued.digest, &Fact::Grant(Grant::of(&facts())), cache.ticket()));
    }
    texts
}

fn measure(tokens: usize, store: &Arc<Store>) -> Row {
    let keyring = Arc::new(Keyring::generate().expect("randomness"));
    let cache = Arc::new(Cache::new(tokens * BYTES_PER_TOKEN, LEASE));
    // With an end, as beside other servers: then each look reads the clock.
    cache.serve(Stopwatch::start());
    let all = fill(tokens, &keyring, &cache);
    let (bytes, known) = (cache.bytes() as f64 / cache.len() as f64, cache.len() as f64 / tokens as f64);
    // Uses are counted anew in each round, as they are after each second.
    let validator = || Validator::new(Arc::clone(&keyring), Arc::clone(&cache), Arc::clone(store), Arc::new(Usage::default()));
    let is_known = |text: &[u8]| keyring.prove(text).is_some_and(|digest| cache.get(&digest).is_some());
    let mut dice = Dice(tokens as u64);
    let mut pick = || {
        // What has made way is not what this bench is about.
        let known = std::iter::repeat_with(|| all.0[dice.below(tokens)]).filter(|text| is_known(&text[..all.1]));
        Texts(known.take(QUESTIONS).collect(), all.1)
    };
    let (mut single, mut grouped, mut invented) = (Vec::new(), Vec::new(), Vec::new());
    let strangers = fill(QUESTIONS, &Keyring::generate().expect("randomness"), &Cache::new(0, LEASE));
    for _ in 0..ROUNDS {
        single.push(ask_each(&validator(), &pick(), Verdict::Valid));
        grouped.push(ask_together(&validator(), &pick()));
        invented.push(ask_each(&validator(), &strangers, Verdict::Unknown));
    }
    Row { tokens, single: Cost::of(single), grouped: Cost::of(grouped), invented: Cost::of(invented), bytes, known }
}

/// A line of the plot: its colour, its name, what it shows.
type Line = (&'static str, &'static str, fn(&Row) -> Cost);

/// Nanoseconds over tokens, these by powers of ten, as SVG 1.1.
fn plot(rows: &[Row]) -> Result<String, std::fmt::Error> {
    const WIDTH: f64 = 560.0;
    const HEIGHT: f64 = 260.0;
    let top = rows.iter().map(|row| row.single.max).fold(100.0_f64, f64::max);
    let top = (top / 100.0).ceil() * 100.0;
    let x = |tokens: usize| 60.0 + ((tokens as f64).log10() - 3.0) / 4.0 * WIDTH;
    let y = |nanos: f64| 30.0 + HEIGHT * (1.0 - nanos / top);
    let mut svg = String::from(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 680 350\" font-family=\"sans-serif\" font-size=\"12\">\n\
         <rect width=\"680\" height=\"350\" fill=\"white\"/>\n",
    );
    writeln!(
        svg,
        "<text x=\"60\" y=\"18\">nanoseconds per judged token, by tokens in memory (median; bars: fastest and slowest round)</text>"
    )?;
    for step in 0..=5 {
        let nanos = top * f64::from(step) / 5.0;
        writeln!(
            svg,
            "<path d=\"M60 {0:.1}H620\" stroke=\"#ddd\"/><text x=\"52\" y=\"{1:.1}\" text-anchor=\"end\">{nanos:.0}</text>",
            y(nanos),
            y(nanos) + 4.0
        )?;
    }
    for row in rows {
        writeln!(svg, "<text x=\"{:.1}\" y=\"308\" text-anchor=\"middle\">{}</text>", x(row.tokens), thousands(row.tokens))?;
    }
    let lines: [Line; 3] = [
        ("#c0392b", "one by one", |row| row.single),
        ("#2471a3", "64 looked up together", |row| row.grouped),
        ("#7f8c8d", "invented", |row| row.invented),
    ];
    for (index, (colour, name, cost)) in lines.into_iter().enumerate() {
        let points: Vec<String> = rows.iter().map(|row| format!("{:.1},{:.1}", x(row.tokens), y(cost(row).median))).collect();
        writeln!(svg, "<polyline points=\"{}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"2\"/>", points.join(" "))?;
        for row in rows {
            let (at, cost) = (x(row.tokens), cost(row));
            writeln!(svg, "<path d=\"M{at:.1} {:.1}V{:.1}\" stroke=\"{colour}\"/>", y(cost.min), y(cost.max))?;
        }
        writeln!(svg, "<text x=\"{}\" y=\"335\" fill=\"{colour}\">{name}</text>", 60 + 200 * index)?;
    }
    svg.push_str("</svg>\n");
    Ok(svg)
}

/// `10,000,000`
fn thousands(number: usize) -> String {
    let digits = number.to_string();
    let groups: Vec<&str> = digits.as_bytes().rchunks(3).rev().map(|group| std::str::from_utf8(group).expect("digits")).collect();
    groups.join(",")
}

/// `--tokens NUMBER`: the largest population.
fn tokens_max() -> usize {
    let arguments: Vec<String> = std::env::args().collect();
    let given = arguments.windows(2).find(|pair| pair[0] == "--tokens").map(|pair| pair[1].parse().expect("--tokens NUMBER"));
    given.unwrap_or(POPULATIONS[POPULATIONS.len() - 1])
}

fn main() {
    let folder = tempfile::tempdir().expect("a folder");
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    let url = DatabaseUrl::Sqlite(folder.path().join("keyward.db"));
    let store = runtime.block_on(Store::open(&url, true, Box::new(|_, _, _| ()))).expect("a store");
    let store = Arc::new(store);
    println!("ns per token, {ROUNDS} rounds of {QUESTIONS} questions in random order: median (min–max)\n");
    println!("| tokens in memory | one by one | {GROUP} looked up together | invented | bytes per token | of all tokens in memory |");
    println!("| ---: | ---: | ---: | ---: | ---: | ---: |");
    let measured = |tokens: usize| {
        let row = measure(tokens, &store);
        let share = 100.0 * row.known;
        println!("| {} | {} | {} | {} | {:.0} | {share:.2} % |", thousands(tokens), row.single, row.grouped, row.invented, row.bytes);
        row
    };
    let rows: Vec<Row> = POPULATIONS.into_iter().filter(|tokens| *tokens <= tokens_max()).map(measured).collect();
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("benches/core.svg");
    fs::write(&path, plot(&rows).expect("text")).expect("writable");
    println!("\nThe plot is in {}.", path.display());
}
