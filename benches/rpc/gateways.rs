//! What a gateway takes for a request, with Keyward and without: the files of `deploy/gateways`, one connection, one request after the other.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use crate::{
    Options,
    calls::start_empty,
    process::{BOTH_CORES, CLIENT_CORE, Keyward, Server, Settings, free_port, pinned},
    site::Site,
    stats::{Spread, print_table},
};

const REQUESTS: u64 = 2_000;

/// A program, its files, its arguments before the first file, and what is cut out of the files so that it asks nobody: from one text to before another, and what stands there then.
struct Program {
    name: &'static str,
    command: &'static str,
    files: &'static [&'static str],
    arguments: &'static [&'static str],
    asking: [&'static str; 3],
}

const PROGRAMS: [Program; 5] = [
    Program {
        name: "Envoy",
        command: "envoy",
        files: &["envoy.yaml"],
        arguments: &["--disable-hot-restart", "--concurrency", "1", "-l", "off", "-c"],
        asking: [
            "                          check_settings:",
            "                      routes:",
            "                          disabled: true\n",
        ],
    },
    Program {
        name: "Traefik",
        command: "traefik",
        files: &["traefik-static.yaml", "traefik.yaml"],
        arguments: &["--configFile"],
        asking: [", keyward]\n      service: upstream", "\n      service: upstream", "]"],
    },
    Program {
        name: "Caddy",
        command: "caddy",
        files: &["Caddyfile"],
        arguments: &["run", "--config"],
        asking: ["forward_auth ", "@grpc ", ""],
    },
    Program {
        name: "nginx",
        command: "nginx",
        files: &["nginx.conf"],
        arguments: &["-p", ".", "-c"],
        asking: ["auth_request /", "auth_request_set $keyward_token_id", "auth_request off;"],
    },
    Program {
        name: "HAProxy",
        command: "haproxy",
        files: &["haproxy.cfg", "keyward.lua"],
        arguments: &["-f"],
        asking: ["    http-request set-var", "    use_backend", ""],
    },
];

impl Program {
    fn path(&self) -> Option<PathBuf> {
        let tools = std::env::var_os("KEYWARD_TEST_TOOLS")
            .map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/.tools"), PathBuf::from);
        [tools.join("bin"), "/usr/sbin".into(), "/usr/local/sbin".into()]
            .into_iter()
            .map(|folder| folder.join(self.command))
            .find(|path| path.exists())
    }

    /// In a folder of its own, at a port of its own.
    fn start(&self, path: &Path, folder: &Path, ports: &[(&str, u16)], token: &str, asks: bool) -> Server {
        fs::create_dir_all(folder).expect("a folder");
        let port = free_port();
        for name in self.files {
            let mut text = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("deploy/gateways").join(name)).expect("a file");
            if let (false, Some(begin)) = (asks, text.find(self.asking[0])) {
                let end = begin + text[begin..].find(self.asking[1]).expect("the end of what is cut out");
                text.replace_range(begin..end, self.asking[2]);
            }
            text = text
                .replace("GATEWAY_TOKEN", token)
                .replace("audience: shop", "audience: billing")
                .replace("audience=shop", "audience=billing");
            text = text.replace("orders:read", "agents:list");
            for (usual, port) in ports.iter().chain(&[("10000", port), ("9901", 0)]) {
                for around in [["127.0.0.1:", ""], ["port_value: ", ""], [":", " {"]] {
                    text = text.replace(&around.join(usual), &around.join(&port.to_string()));
                }
            }
            fs::write(folder.join(name), text).expect("written");
        }
        let mut command = pinned(BOTH_CORES, path);
        command.args(self.arguments).arg(folder.join(self.files[0])).current_dir(folder).env("KEYWARD_TOKEN", token).env("HOME", folder);
        Server::start(command, port, &folder.join("log"))
    }
}

/// Who is asked, and what each round took in microseconds.
struct Row {
    name: String,
    server: Option<Server>,
    port: u16,
    samples: Vec<f64>,
}

/// Measures, and prints the table.
pub fn compare(options: &Options, site: &Site) {
    let http = free_port();
    let settings = Settings {
        cores: BOTH_CORES,
        http: Some(http),
        more: vec!["--gateway-peers".into(), "127.0.0.1/32".into()],
        ..Settings::default()
    };
    let keyward = Keyward::start(&site.copy("behind"), &settings);
    let upstream = start_empty(site, "upstream", None);
    let ports = [("50051", keyward.server.port), ("8080", http), ("9000", upstream.port)];
    let mut rows = vec![Row { name: "the upstream alone".to_owned(), port: upstream.port, server: None, samples: Vec::new() }];
    for program in &PROGRAMS {
        let Some(path) = program.path() else {
            eprintln!("{} is left out (tests/run installs it)", program.name);
            continue;
        };
        for asks in [false, true] {
            let name = format!("{}{}", program.name, if asks { ", asking Keyward" } else { "" });
            let server = program.start(&path, &site.folder.join(name.replace([',', ' '], "")), &ports, &site.caller, asks);
            rows.push(Row { name, port: server.port, server: Some(server), samples: Vec::new() });
        }
    }
    for row in &rows {
        ready(row, &site.asked);
    }
    for round in 0..=options.rounds {
        let judged = keyward.verdicts("VALID");
        for row in &mut rows {
            let mean = h2load(row.port, &site.asked);
            // The first round warms up.
            row.samples.extend((round > 0).then_some(mean));
        }
        let asking = rows.iter().filter(|row| row.name.contains("asking")).count() as u64;
        assert_eq!(keyward.verdicts("VALID") - judged, asking * REQUESTS, "each request was asked about, where it should be");
    }
    println!(
        "## A request through a gateway: {} rounds of {REQUESTS} requests, one after the other on one connection of HTTP/1.1\n",
        options.rounds
    );
    let cells = rows.iter().enumerate().map(|(place, row)| {
        let added = |other: &Row| Spread::of(row.samples.iter().zip(&other.samples).map(|(with, without)| with - without)).show(0);
        let asking = if row.name.contains("asking") { added(&rows[place - 1]) } else { String::new() };
        vec![row.name.clone(), Spread::of(row.samples.iter().copied()).show(0), added(&rows[0]), asking]
    });
    let cells: Vec<_> = cells.collect();
    print_table(
        &["who answers", "µs per request (median of the rounds' means, min–max)", "more than the upstream alone", "more for asking"],
        &cells,
    );
    // nginx leaves its worker behind when it is killed.
    for server in rows.into_iter().filter_map(|row| row.server) {
        server.end();
    }
}

/// Waits until a good token comes through: some gateways listen before they know what to do.
fn ready(row: &Row, token: &str) {
    let begin = std::time::Instant::now();
    while !said(row.port, token, 1).contains("1 succeeded, 0 failed") {
        assert!(begin.elapsed().as_secs() < 20, "{} lets nobody through", row.name);
        std::thread::sleep(std::time::Duration::from_millis(50));
    }
}

fn said(port: u16, token: &str, requests: u64) -> String {
    let mut command: Command = pinned(CLIENT_CORE, "h2load");
    command.args(["--h1", "-c", "1", "-m", "1", "-n", &requests.to_string(), "-H", &format!("authorization: Bearer {token}")]);
    let output = command.arg(format!("http://127.0.0.1:{port}/")).output().expect("h2load");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Microseconds per request.
fn h2load(port: u16, token: &str) -> f64 {
    let said = said(port, token, REQUESTS);
    assert!(said.contains(&format!("{REQUESTS} succeeded, 0 failed")) && said.contains(&format!("status codes: {REQUESTS} 2xx")), "{said}");
    // finished in 1.25s, 80123.45 req/s, 10.52MB/s
    let rate: Option<f64> = said.lines().find_map(|line| line.strip_prefix("finished in ")?.split(' ').nth(1)?.parse().ok());
    1e6 / rate.expect("a rate")
}
