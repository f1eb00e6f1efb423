//! A real gateway for a test: Envoy, Traefik, Caddy, nginx or `HAProxy`, started with the very files of `deploy/gateways`, in front of an upstream that notes what reaches it, with a
//! Keyward that can be cut off or slowed down.

use std::{
    fs::{self, File},
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Duration,
};

use tempfile::TempDir;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    time::timeout,
};

use crate::{
    proxy::Proxy,
    upstream::Upstream,
    world::{self, World, eventually, free_port},
};

/// A gateway's program.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Program {
    Envoy,
    Traefik,
    Caddy,
    Nginx,
    Haproxy,
}

impl Program {
    /// Where it is, if this machine has it.
    pub fn path(self) -> Option<PathBuf> {
        let name = match self {
            Self::Envoy => "envoy",
            Self::Traefik => "traefik",
            Self::Caddy => "caddy",
            Self::Nginx => "nginx",
            Self::Haproxy => {
                return ["/usr/sbin/haproxy", "/usr/local/sbin/haproxy"].map(PathBuf::from).into_iter().find(|path| path.exists());
            }
        };
        Some(world::tools()?.join("bin").join(name)).filter(|path| path.exists())
    }

    /// Its files in `deploy/gateways`. The first one is what it is started with.
    fn files(self) -> &'static [&'static str] {
        match self {
            Self::Envoy => &["envoy.yaml"],
            Self::Traefik => &["traefik-static.yaml", "traefik.yaml"],
            Self::Caddy => &["Caddyfile"],
            Self::Nginx => &["nginx.conf"],
            Self::Haproxy => &["haproxy.cfg", "keyward.lua"],
        }
    }

    /// Where a file says which scope is needed: without it the workspace's routes say it.
    pub fn scope_setting(self) -> &'static str {
        if self == Self::Envoy { "required_scopes: orders:read" } else { "&required_scopes=orders:read" }
    }

    fn arguments(self, folder: &Path) -> Vec<String> {
        let file = folder.join(self.files()[0]).display().to_string();
        let words: Vec<&str> = match self {
            Self::Envoy => vec!["--disable-hot-restart", "--concurrency", "1", "-l", "warning", "-c", &file],
            Self::Traefik => return vec![format!("--configFile={file}")],
            Self::Caddy => vec!["run", "--config", &file],
            Self::Nginx => {
                return vec!["-e".to_owned(), "stderr".to_owned(), "-p".to_owned(), folder.display().to_string(), "-c".to_owned(), file];
            }
            Self::Haproxy => vec!["-f", &file],
        };
        words.into_iter().map(str::to_owned).collect()
    }
}

/// A gateway between a client and an upstream. It ends with its owner.
pub struct Front {
    pub program: Program,
    pub world: World,
    pub upstream: Upstream,
    /// Between the gateway and Keyward.
    pub to_keyward: Proxy,
    pub port: u16,
    folder: TempDir,
    child: Child,
}

impl Front {
    /// Starts it as the files say.
    pub async fn start(program: Program) -> Self {
        Self::start_with(program, &[]).await
    }

    /// As [`Front::start`]; what a request needs is said by the workspace's routes.
    pub async fn start_by_routes(program: Program) -> Self {
        Self::start_with(program, &[(program.scope_setting(), "")]).await
    }

    /// As [`Front::start`], with other settings in the place of some.
    pub async fn start_with(program: Program, settings: &[(&str, &str)]) -> Self {
        // Nobody came with a token; whoever answers so has asked.
        Self::start_until(program, settings, 401).await
    }

    /// As [`Front::start_with`]; it is up when who comes without a token gets this status.
    pub async fn start_until(program: Program, settings: &[(&str, &str)], status: u16) -> Self {
        let mut world = World::unstarted(world::Backend::Sqlite).await;
        if program == Program::Traefik {
            world.settings.insert("gateway_peers", "127.0.0.1/32".to_owned());
        }
        world.start_server().await;
        let keyward = if program == Program::Envoy { world.server().address() } else { world.server().http_address().expect("HTTP is on") };
        let to_keyward = Proxy::start(keyward.port()).await;
        let upstream = Upstream::start().await;
        let token = world.validator().await.token.expect("a token");
        let folder = tempfile::tempdir().expect("a folder");
        let port = free_port();
        let ports =
            [("10000", port), ("50051", to_keyward.port), ("8080", to_keyward.port), ("9000", upstream.port), ("9901", free_port())];
        write_files(program, folder.path(), &ports, &token, settings);
        let log = File::create(folder.path().join("log")).expect("a log");
        let mut command = Command::new(program.path().expect("it is here"));
        command.args(program.arguments(folder.path())).current_dir(folder.path()).env("KEYWARD_TOKEN", &token).env("HOME", folder.path());
        command.stdin(Stdio::null()).stdout(log.try_clone().expect("a log")).stderr(log).process_group(0);
        let child = command.spawn().expect("it runs");
        let mut front = Self { program, world, upstream, to_keyward, port, folder, child };
        front.come_up(status).await;
        front
    }

    async fn come_up(&mut self, status: u16) {
        eventually("the gateway comes up", async || {
            assert!(self.child.try_wait().expect("a child").is_none(), "{:?} does not start: {}", self.program, self.log());
            let answer = ask(self.port, "GET / HTTP/1.1\r\nhost: orders\r\nconnection: close\r\n\r\n").await;
            answer.is_some_and(|answer| answer.status == status).then_some(())
        })
        .await;
    }

    /// What it has said.
    pub fn log(&self) -> String {
        fs::read_to_string(self.folder.path().join("log")).unwrap_or_default()
    }

    /// Sends a request as it is written, and waits for the answer. The gateway must close after it.
    pub async fn ask(&self, request: &str) -> Answer {
        ask(self.port, request).await.unwrap_or_else(|| panic!("no answer to {:.200}: {}", request, self.log()))
    }

    /// As [`Front::ask`]; what has come after a second, or before the end of the connection, if that is an answer.
    pub async fn ask_shortly(&self, request: &str) -> Option<Answer> {
        let mut stream = TcpStream::connect(("127.0.0.1", self.port)).await.expect("a connection");
        // Some do not read to the end of what they refuse.
        let _ = stream.write_all(request.as_bytes()).await;
        let mut bytes = Vec::new();
        let read = async {
            while let Ok(1..) = stream.read_buf(&mut bytes).await {
                if Answer::parse(&bytes).is_some() {
                    return;
                }
            }
        };
        let _ = timeout(Duration::from_secs(1), read).await;
        Answer::parse(&bytes)
    }

    /// A GET of this path with these header lines.
    pub async fn get(&self, path: &str, lines: &[&str]) -> Answer {
        let lines: Vec<&str> = lines.iter().copied().chain(["connection: close"]).collect();
        self.ask(&format!("GET {path} HTTP/1.1\r\nhost: orders\r\n{}\r\n\r\n", lines.join("\r\n"))).await
    }
}

impl Drop for Front {
    fn drop(&mut self) {
        // The whole group: nginx and HAProxy have children of their own.
        let _ = Command::new("kill").args(["-KILL", "--", &format!("-{}", self.child.id())]).status();
        let _ = self.child.wait();
    }
}

fn write_files(program: Program, folder: &Path, ports: &[(&str, u16)], token: &str, settings: &[(&str, &str)]) {
    let mut replaced = 0;
    for name in program.files() {
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("deploy/gateways").join(name);
        let mut text = fs::read_to_string(source).expect("a file of deploy/gateways").replace("GATEWAY_TOKEN", token);
        for (usual, port) in ports {
            text = text.replace(&format!("127.0.0.1:{usual}"), &format!("127.0.0.1:{port}"));
            text = text.replace(&format!("port_value: {usual}"), &format!("port_value: {port}"));
            text = text.replace(&format!(":{usual} {{"), &format!(":{port} {{"));
        }
        for (usual, other) in settings {
            replaced += text.matches(usual).count();
            text = text.replace(usual, other);
        }
        fs::write(folder.join(name), text).expect("written");
    }
    assert_eq!(replaced, settings.len(), "each setting stands in one place: {settings:?}");
}

/// What a client of the gateway got.
#[derive(Clone, Debug)]
pub struct Answer {
    pub status: u16,
    /// With small letters.
    pub headers: Vec<(String, String)>,
    pub body: String,
}

impl Answer {
    /// The header of this name, in small letters; empty if there is none.
    pub fn header(&self, name: &str) -> &str {
        self.headers.iter().find(|(each, _)| each == name).map_or("", |(_, value)| value)
    }

    fn parse(bytes: &[u8]) -> Option<Self> {
        let text = String::from_utf8_lossy(bytes);
        let (head, body) = text.split_once("\r\n\r\n")?;
        let mut lines = head.split("\r\n");
        let status = lines.next()?.split(' ').nth(1)?.parse().ok()?;
        let headers =
            lines.filter_map(|line| line.split_once(':')).map(|(name, value)| (name.to_ascii_lowercase(), value.trim().to_owned()));
        Some(Self { status, headers: headers.collect(), body: body.to_owned() })
    }
}

/// Nothing if the connection was refused, or closed without an answer.
async fn ask(port: u16, request: &str) -> Option<Answer> {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).await.ok()?;
    stream.write_all(request.as_bytes()).await.ok()?;
    let mut bytes = Vec::new();
    let read = async {
        // What came before a reset is an answer as well.
        while let Ok(1..) = stream.read_buf(&mut bytes).await {
            let is_whole = |answer: &Answer| answer.header("content-length").parse() == Ok(answer.body.len());
            if Answer::parse(&bytes).as_ref().is_some_and(is_whole) {
                return;
            }
        }
    };
    timeout(Duration::from_mins(1), read).await.ok()?;
    Answer::parse(&bytes)
}
