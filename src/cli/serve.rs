//! The commands that run on the server's own machine: `serve`, `migrate`, `recover`, `keyring`.

#![expect(clippy::print_stdout, clippy::print_stderr, reason = "the command line speaks to people")]

use std::{
    io::{IsTerminal as _, Write as _},
    net::SocketAddr,
    path::Path,
    process::ExitCode,
};

use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::{
    ambient::Clock,
    api::gate::Limits,
    config::Config,
    server::{self, Server},
    store::Store,
    telemetry,
    token::{Keyring, Kid, Secret},
};

/// Two, so that no tick waits for a slow call.
const CONTROL_THREADS: usize = 2;

/// Runs the server until it is told to stop.
pub(super) fn serve(config: &Config) -> ExitCode {
    telemetry::init_logs(&config.log, config.log_format);
    // For the control plane and the store; the data plane has threads of its own.
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(CONTROL_THREADS).enable_all().build();
    outcome(runtime.map_err(|error| error.to_string()).and_then(|runtime| runtime.block_on(run(config))))
}

/// Brings the database's schema up to date.
pub(super) fn migrate(config: &Config) -> ExitCode {
    outcome(with_store(config, false).inspect(|()| {
        println!("The schema of {:?} is up to date.", config.database_url);
    }))
}

/// As [`migrate`], for a database that was put back to an earlier state.
pub(super) fn restore(config: &Config) -> ExitCode {
    outcome(with_store(config, true).inspect(|()| {
        println!("The schema of {:?} is up to date, and every server forgets what it knew of it.", config.database_url);
        println!("What was revoked after the backup was made is not revoked any more: revoke it again.");
    }))
}

fn with_store(config: &Config, is_restored: bool) -> Result<(), String> {
    telemetry::init_logs(&config.log, config.log_format);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(|error| error.to_string())?;
    runtime.block_on(async {
        let store = Store::open(&config.database_url, true, Box::new(|_, _, _| ())).await?;
        let begun = if is_restored { store.begin_epoch().await } else { Ok(()) };
        begun.and(store.close().await).map_err(|error| error.to_string())
    })
}

/// Makes one more root token, for when the last one is lost.
pub(super) fn recover(config: &Config) -> ExitCode {
    telemetry::init_logs(&config.log, config.log_format);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let secret = runtime.map_err(|error| error.to_string()).and_then(|runtime| runtime.block_on(server::recover(config, &Clock::system())));
    outcome(secret.map(|secret| {
        eprintln!("A new root token, which may do everything and is shown this once:");
        println!("{}", secret.reveal());
    }))
}

/// Adds a key that makes no tokens yet.
pub(super) fn add_key(config: &Config) -> ExitCode {
    let added = change_keyring(config, Keyring::add);
    outcome(added.map(|kid| {
        println!(
            "Key {} is known in {}, and makes no tokens yet.\nGive this file to every server of the database and restart them one after the other; then `keyward keyring promote`.",
            kid.as_char(),
            config.keyring_file.display()
        );
    }))
}

/// Has new tokens made with the key that was added.
pub(super) fn promote_key(config: &Config) -> ExitCode {
    show_rotated(config, change_keyring(config, Keyring::promote))
}

/// Both at once.
pub(super) fn rotate_keyring(config: &Config) -> ExitCode {
    show_rotated(config, change_keyring(config, |keyring| keyring.add().and_then(|_| keyring.promote())))
}

fn show_rotated(config: &Config, rotated: Result<Kid, String>) -> ExitCode {
    outcome(rotated.map(|kid| {
        println!(
            "Key {} is the primary one in {}; the others go on proving the tokens that they made.\nServers read the keyring when they start: restart them.",
            kid.as_char(),
            config.keyring_file.display()
        );
    }))
}

fn change_keyring(config: &Config, change: impl FnOnce(&mut Keyring) -> Result<Kid, String>) -> Result<Kid, String> {
    let path = &config.keyring_file;
    let keyring = Keyring::load(path)?;
    let mut keyring =
        keyring.ok_or_else(|| format!("there is no keyring {}: `keyward serve` makes one on its first start", path.display()))?;
    let kid = change(&mut keyring)?;
    keyring.save(path)?;
    Ok(kid)
}

fn outcome(result: Result<(), String>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("keyward: {error}");
            ExitCode::FAILURE
        }
    }
}

async fn run(config: &Config) -> Result<(), String> {
    let on = |kind| signal(kind).map_err(|error| error.to_string());
    let (mut terminate, mut interrupt, mut hangup) =
        (on(SignalKind::terminate())?, on(SignalKind::interrupt())?, on(SignalKind::hangup())?);
    let show = |secret: &Secret, address| {
        let text = welcome(secret, address, config);
        let mut stdout = std::io::stdout();
        let shown = stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush());
        shown.map_err(|error| format!("the root token cannot be shown on standard output: {error}; nothing was created"))
    };
    let server = Server::start(config, Clock::system(), Limits::default(), show).await?;
    wait(&server, &mut terminate, &mut interrupt, &mut hangup).await;
    tokio::select! {
        stopped = server.stop() => stopped,
        _ = interrupt.recv() => Err("interrupted twice: stopped without waiting for what was under way".to_owned()),
    }
}

/// Waits for the wish to stop.
async fn wait(server: &Server, terminate: &mut Signal, interrupt: &mut Signal, hangup: &mut Signal) {
    loop {
        tokio::select! {
            _ = terminate.recv() => return,
            _ = interrupt.recv() => return,
            _ = hangup.recv() => match server.reload() {
                Ok(_) => tracing::info!("the certificates were read again"),
                Err(error) => tracing::error!(%error, "the certificates on disk cannot be used; those from before stay"),
            },
        }
    }
}

/// The root token, to be shown this once, and what one would type next. Where a file has it and nobody sits at a terminal, it is not
/// written to what may be a log.
fn welcome(secret: &Secret, address: SocketAddr, config: &Config) -> String {
    let scheme = if config.tls.is_some() { "https" } else { "http" };
    let host = match address {
        SocketAddr::V4(v4) if v4.ip().is_unspecified() => format!("127.0.0.1:{}", v4.port()),
        SocketAddr::V6(v6) if v6.ip().is_unspecified() => format!("[::1]:{}", v6.port()),
        other => other.to_string(),
    };
    let program = std::env::current_exe().ok();
    let program = program.as_deref().and_then(Path::to_str).filter(|path| !path.contains(['\'', ' '])).unwrap_or("keyward");
    let (told, token) = match &config.root_token_file {
        Some(path) if !std::io::stdout().is_terminal() => {
            let path = path.display();
            (format!("The root token, which may do everything, is in {path}."), format!("\"$(cat {path})\""))
        }
        _ => {
            let token = secret.reveal();
            (format!("The root token may do everything, and is shown this once:\n\n    {token}"), token.to_owned())
        }
    };
    format!(
        "\nThis is the first start. {told}\n\nCreate a first token and validate it, in another terminal:\n\n\
         export KEYWARD_ADDRESS={scheme}://{host} KEYWARD_TOKEN={token}\n\
         {program} token create --name 'My first token' | {program} validate -\n\n"
    )
}
