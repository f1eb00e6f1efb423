//! How long calls take at half load, and what two cores give.

use crate::{
    Options,
    calls::start_empty,
    process::{BOTH_CORES, CLIENT_CORE, Client, Keyward, Server, Settings},
    site::Site,
    stats::{Spread, print_table},
};

/// How long calls are sent at the fixed rate in each round.
const SECONDS: u32 = 3;
/// Calls of a round with each server, as many times as of a round of single calls.
const CALLS: u64 = 2;

/// Who is asked at a fixed rate, and what came of it in each round: p50, p99, by how much the client was late (p99), all in microseconds; and for how
/// many milliseconds of a second the server waited for its core.
struct Paced<'a> {
    name: &'static str,
    server: &'a Server,
    /// Whose verdicts are counted.
    keyward: Option<&'a Keyward>,
    client: Client,
    rounds: Vec<[f64; 4]>,
}

impl Paced<'_> {
    fn round(&mut self, rate: f64, is_kept: bool) {
        let judged = || self.keyward.map_or(0, |keyward| keyward.verdicts("VALID"));
        let (before, waited) = (judged(), self.server.waited());
        let [count, valid, seconds, p50, p99, late] = self.client.run(&format!("paced {rate} {SECONDS}"))[..] else {
            panic!("six numbers")
        };
        let waited = (self.server.waited() - waited) / 1e6 / seconds;
        assert_eq!(count as u64, valid as u64, "answers, and good ones");
        assert_eq!(judged() - before, if self.keyward.is_some() { count as u64 } else { 0 }, "calls that were judged VALID");
        self.rounds.extend(Some([p50, p99, late, waited]).filter(|_| is_kept));
    }

    fn cells(&self) -> Vec<String> {
        let of = |index: usize| Spread::of(self.rounds.iter().map(|round| round[index])).show(0);
        let ratio = Spread::of(self.rounds.iter().map(|round| round[1] / round[0]));
        vec![self.name.to_owned(), of(0), of(1), ratio.show(2), of(2), of(3)]
    }
}

/// Measures latency at half of this rate, and prints it. The server that does nothing shows what of it is the machine's.
pub fn latency(options: &Options, site: &Site, saturated: f64) {
    let keyward = Keyward::start(&site.copy("latency"), &Settings::default());
    let empty = start_empty(site, "tonic-multi", None);
    let tokens = site.tokens("asked.tokens", std::slice::from_ref(&site.asked));
    let client = |server: &Server| Client::start(CLIENT_CORE, server.port, &site.caller, &tokens);
    let mut sides = [
        Paced { name: "Keyward", server: &keyward.server, keyward: Some(&keyward), client: client(&keyward.server), rounds: Vec::new() },
        Paced { name: "tonic, empty handler", server: &empty, keyward: None, client: client(&empty), rounds: Vec::new() },
    ];
    let rate = (saturated / 2.0).floor();
    for round in 0..=options.few_rounds() {
        for side in &mut sides {
            side.round(rate, round > 0);
        }
    }
    let rounds = options.few_rounds();
    println!("## Latency at half load: {rate:.0} calls a second on a fixed schedule, {rounds} rounds of {SECONDS} s\n");
    let head = [
        "server",
        "p50 µs (median, min–max)",
        "p99 µs",
        "p99 / p50 (aim: at most 2)",
        "the client was late by, p99 µs",
        "the server waited for its core, ms in a second",
    ];
    print_table(&head, &sides.iter().map(Paced::cells).collect::<Vec<_>>());
    println!("If client or server had to wait for their cores, others were using them, and p99 says nothing.\n");
}

/// A server with so many workers, and who fills it.
struct Side {
    keyward: Keyward,
    client: Client,
    /// Nanoseconds a call, and calls per second, in each round.
    cpu: Vec<f64>,
    rate: Vec<f64>,
}

impl Side {
    fn new(site: &Site, name: &str, settings: &Settings<'_>, client_cores: &str) -> Self {
        let keyward = Keyward::start(&site.copy(name), settings);
        let tokens = site.tokens("asked.tokens", std::slice::from_ref(&site.asked));
        let client = Client::start(client_cores, keyward.server.port, &site.caller, &tokens);
        Self { keyward, client, cpu: Vec::new(), rate: Vec::new() }
    }

    fn round(&mut self, calls: u64, is_kept: bool) {
        let (judged, before) = (self.keyward.verdicts("VALID"), self.keyward.server.cpu());
        let [count, valid, seconds] = self.client.run(&format!("closed {calls}"))[..] else { panic!("three numbers") };
        let cpu = self.keyward.server.cpu() - before;
        assert_eq!((count as u64, valid as u64), (calls, calls), "answers, and good ones");
        assert_eq!(self.keyward.verdicts("VALID") - judged, calls, "calls that were judged VALID");
        self.cpu.extend(Some(cpu / count).filter(|_| is_kept));
        self.rate.extend(Some(count / seconds).filter(|_| is_kept));
    }
}

/// Measures what a call costs with one worker and with two, and prints what two cores give: with the client on the same two cores, only the
/// server's own time can say it.
pub fn scaling(options: &Options, site: &Site) {
    let two = Settings { cores: BOTH_CORES, workers: 2, ..Settings::default() };
    let mut one = Side::new(site, "one", &Settings::default(), CLIENT_CORE);
    let mut two = Side::new(site, "two", &two, BOTH_CORES);
    for round in 0..=options.few_rounds() {
        let mut sides = [&mut one, &mut two];
        if round % 2 == 1 {
            sides.reverse();
        }
        for side in sides {
            side.round(options.calls * CALLS, round > 0);
        }
    }
    println!("## Two cores: {} rounds of {} calls each\n", options.few_rounds(), options.calls * CALLS);
    let cells = |name: &str, side: &Side| {
        let micros = Spread::of(side.cpu.iter().map(|cpu| cpu / 1e3));
        let rate = Spread::of(side.rate.iter().copied());
        vec![name.to_owned(), micros.show(1), format!("{:.0}", 1e6 / micros.median), rate.show(0)]
    };
    let head = ["server", "server CPU µs per call", "calls per second of CPU", "calls per second, client beside it"];
    print_table(
        &head,
        &[cells("one worker on one core, client on the other", &one), cells("two workers, client on the same two cores", &two)],
    );
    let factor = Spread::of(one.cpu.iter().zip(&two.cpu).map(|(one, two)| 2.0 * one / two));
    println!("Two cores give {} times one core (2 × CPU per call with one worker / with two; aim: at least 1.9)\n", factor.show(2));
}
