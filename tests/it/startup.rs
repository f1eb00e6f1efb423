//! What an operator can do wrong: the server does not start, says what to do, and loses nothing.

use std::{
    fs,
    io::{BufRead as _, BufReader, Read as _},
    os::unix::fs::{MetadataExt as _, PermissionsExt as _},
    path::Path,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use keyward::proto::{self, Verdict};

use crate::world::{self, Backend, World, free_port, keyward};

crate::on_both_databases!(
    a_newer_schema_is_left_alone,
    a_program_works_beside_a_newer_schema,
    an_old_schema_is_named_when_migrating_is_off,
    a_missing_or_foreign_keyring_stops_the_start,
    a_removed_key_ends_its_tokens,
    the_root_token_is_shown_once,
    a_lost_root_token_is_replaced,
);

/// Starts the program and waits for it to give up; its exit code and what it said.
fn refusal(command: &mut Command) -> (i32, String) {
    let output = command.stdin(Stdio::null()).output().expect("it runs");
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!said.contains("panicked") && !said.contains("hunter2"), "{said}");
    (output.status.code().expect("an exit code"), said)
}

fn serve(data: &Path) -> Command {
    let mut command = keyward();
    command
        .args(["serve", "--listen", "127.0.0.1:0", "--http-listen", "off", "--metrics-listen", "off", "--data-dir"])
        .arg(data)
        .current_dir(data.parent().expect("a parent"));
    command
}

/// A server as a process of its own, ended with the test.
struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn wrong_settings_are_reported_together() {
    let folder = tempfile::tempdir().expect("a folder");
    let data = folder.path().join("data");
    fs::write(folder.path().join("keyward.toml"), "log_fromat = \"json\"\ncache_bytes = \"many\"\n").expect("writable");
    let (code, said) = refusal(serve(&data).env("KEYWARD_LISTENN", "x").env("KEYWARD_DATABASE_URL", "postgres//u:hunter2@h"));
    assert_eq!(code, 2, "{said}");
    for part in [
        "log_fromat",
        "did you mean log_format",
        "cache_bytes",
        "KEYWARD_LISTENN",
        "did you mean KEYWARD_LISTEN",
        "KEYWARD_DATABASE_URL must be",
    ] {
        assert!(said.contains(part), "{part} is not in {said}");
    }
    assert!(!data.exists(), "nothing was made");
}

#[test]
fn addresses_and_certificates_are_checked_first() {
    let folder = tempfile::tempdir().expect("a folder");
    let data = folder.path().join("data");
    let taken = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let taken = taken.local_addr().expect("an address").to_string();
    let (code, said) =
        refusal(keyward().args(["serve", "--listen", &taken, "--http-listen", "off", "--metrics-listen", "off", "--data-dir"]).arg(&data));
    assert!(code == 1 && said.contains(&taken) && said.contains("--listen"), "{code} {said}");
    let (code, said) = refusal(
        keyward().args(["serve", "--listen", "0.0.0.0:0", "--http-listen", "off", "--metrics-listen", "off", "--data-dir"]).arg(&data),
    );
    assert!(code == 2 && said.contains("--insecure"), "{code} {said}");
    let pair = |name: &str| {
        let key = rcgen::KeyPair::generate().expect("a key");
        let certificate = rcgen::CertificateParams::new(vec![name.to_owned()]).expect("a name").self_signed(&key).expect("a certificate");
        (certificate.pem(), key.serialize_pem())
    };
    let ((one, _), (_, other)) = (pair("one"), pair("other"));
    let (cert, key) = (folder.path().join("cert.pem"), folder.path().join("key.pem"));
    fs::write(&cert, one).expect("writable");
    for (contents, part) in [(other.as_str(), "cannot be used together"), ("nonsense", "no private key")] {
        fs::write(&key, contents).expect("writable");
        let (code, said) = refusal(serve(&data).arg("--tls-cert").arg(&cert).arg("--tls-key").arg(&key));
        assert!(code == 1 && said.contains(part), "{code} {said}");
    }
    let (_, said) = refusal(serve(&data).arg("--tls-cert").arg(&cert).arg("--tls-key").arg(folder.path().join("none.pem")));
    assert!(said.contains("none.pem cannot be read"), "{said}");
    assert!(!data.join("keyward.db").exists(), "nothing was made");
}

#[test]
fn a_database_that_does_not_answer_is_named() {
    let folder = tempfile::tempdir().expect("a folder");
    let data = folder.path().join("data");
    let begin = Instant::now();
    let url = format!("postgres://u:hunter2@127.0.0.1:{}/d", free_port());
    let (code, said) = refusal(serve(&data).env("KEYWARD_DATABASE_URL", url));
    assert!(code == 1 && said.contains("PostgreSQL"), "{code} {said}");
    assert!(begin.elapsed() < Duration::from_secs(15));
    fs::create_dir_all(&data).expect("a folder");
    fs::write(data.join("keyward.db"), "this is no database, it is a text of some length that SQLite will not take for one")
        .expect("writable");
    let (code, said) = refusal(&mut serve(&data));
    assert!(code == 1 && said.contains("keyward.db"), "{code} {said}");
    assert!(fs::read_to_string(data.join("keyward.db")).expect("still there").starts_with("this is no database"), "nothing was lost");
}

#[test]
fn a_keyring_that_others_can_read_stops_the_start() {
    world::runtime().block_on(async {
        let mut world = World::start(Backend::Sqlite).await;
        world.stop_server().await;
        let data = world.folder.path().join("data");
        let keyring = data.join("keyring");
        let mode = |path: &Path| fs::metadata(path).expect("there").mode() & 0o777;
        assert_eq!((mode(&keyring), mode(&data)), (0o600, 0o700));
        fs::set_permissions(&keyring, fs::Permissions::from_mode(0o644)).expect("ours");
        let (code, said) = refusal(&mut serve(&data));
        assert!(code == 1 && said.contains("chmod 600"), "{code} {said}");
        fs::set_permissions(&keyring, fs::Permissions::from_mode(0o600)).expect("ours");
        let good = fs::read(&keyring).expect("readable");
        fs::write(&keyring, "A primary 00").expect("writable");
        let (code, said) = refusal(&mut serve(&data));
        assert!(code == 1 && said.contains("damaged"), "{code} {said}");
        fs::write(&keyring, good).expect("writable");
        world.start_server().await;
        assert_eq!(world.validator().await.verdict(world.root_token()).await, Verdict::Valid);
    });
}

#[test]
fn a_full_disk_loses_nothing() {
    let folder = tempfile::tempdir().expect("a folder");
    let mount = folder.path().display().to_string();
    let mounted = Command::new("mount").args(["-t", "tmpfs", "-o", "size=1500k,mode=700", "none", &mount]).output();
    if !mounted.is_ok_and(|output| output.status.success()) {
        return world::skip("no right to mount a small file system for the full disk");
    }
    world::runtime().block_on(async {
        let mut world = World::start_in(Backend::Sqlite, folder).await;
        let (admin, validator) = (world.admin().await, world.validator().await);
        let mut created = Vec::new();
        let refused = loop {
            match admin.create(world::new_token(&"x".repeat(100), &[])).await {
                Ok(answer) => created.push(answer.secret),
                Err(status) => break status,
            }
            assert!(created.len() < 20_000, "the disk does not fill");
        };
        assert_eq!(refused.code(), tonic::Code::Unavailable, "{refused:?}");
        assert!(refused.message().contains("full"), "{refused:?}");
        for secret in created.iter().rev().take(50) {
            assert_eq!(validator.verdict(secret).await, Verdict::Valid, "what was acknowledged is there");
        }
        drop((admin, validator));
        // The last uses may have no room either: what is lost is said.
        let _stopped = world.take_server().stop().await;
        let grown = Command::new("mount").args(["-o", "remount,size=8m", &world.folder.path().display().to_string()]).status();
        assert!(grown.is_ok_and(|status| status.success()));
        world.start_server().await;
        let validator = world.validator().await;
        for secret in &created {
            assert_eq!(validator.verdict(secret).await, Verdict::Valid, "what was acknowledged is there");
        }
        let count = world.db_number("SELECT COUNT(*) FROM token").await;
        assert_eq!(world.db_number("SELECT COUNT(DISTINCT token_id) FROM audit_event").await, count, "each with its audit row");
        world.stop_server().await;
        let _ = Command::new("umount").args(["-l", &world.folder.path().display().to_string()]).status();
    });
}

#[test]
fn a_small_database_is_not_taken_for_one_that_stays_small() {
    world::run(Backend::Sqlite, statistics_come_with_many_tokens);
}

/// SQLite would read all of a table that was small when it looked.
async fn statistics_come_with_many_tokens(mut world: World) {
    let statistics = "SELECT COUNT(*) FROM sqlite_master WHERE name = 'sqlite_stat1'";
    world.restart().await;
    world.stop_server().await;
    assert_eq!(world.db_number(statistics).await, 0, "of a few tokens");
    world.start_server().await;
    let id = world.admin().await.create(world::new_token("one of many", &[])).await.expect("created").token.expect("a token").id;
    let columns = "workspace, display_name, principal, kind, state, prefix, hint, scopes, audiences, allowed_cidrs, metadata, session_id, created_by, \
                   create_time, update_time, expire_time, revoke_reason, version, is_root";
    world
        .db_execute(&format!(
            "WITH RECURSIVE number(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM number WHERE n < 10000) \
             INSERT INTO token (id, digest, {columns}) SELECT 'tok_' || printf('%022d', n), randomblob(24), {columns} FROM number, token \
             WHERE id = '{id}'"
        ))
        .await;
    world.stop_server().await;
    assert_eq!(world.db_number(statistics).await, 1, "of many");
}

async fn a_newer_schema_is_left_alone(mut world: World) {
    world.stop_server().await;
    world.db_execute("INSERT INTO seaql_migrations (version, applied_at) VALUES ('9999_from_the_future', 0)").await;
    world.db_execute("UPDATE schema_floor SET version = '9999_from_the_future'").await;
    let error = world.try_start_server().await.expect_err("newer");
    assert!(error.contains("newer keyward"), "{error}");
    world.db_execute("DELETE FROM seaql_migrations WHERE version = '9999_from_the_future'").await;
    world.start_server().await;
    assert_eq!(world.validator().await.verdict(world.root_token()).await, Verdict::Valid);
}

/// As while servers are brought up to date one after the other: the first to come expands the schema.
async fn a_program_works_beside_a_newer_schema(mut world: World) {
    let (_, before) = world.admin().await.issue("before", &[]).await;
    world.db_execute("INSERT INTO seaql_migrations (version, applied_at) VALUES ('9999_from_the_future', 0)").await;
    for table in ["token", "principal", "workspace", "change_log", "change_head", "replica", "audit_event", "token_usage"] {
        world.db_execute(&format!("ALTER TABLE {table} ADD COLUMN from_the_future BIGINT NOT NULL DEFAULT 7")).await;
    }
    let (token, during) = world.admin().await.issue("during", &[]).await;
    world.restart().await;
    let (_, after) = world.admin().await.issue("after", &[]).await;
    world.admin().await.revoke(&token.id).await.expect("revoked");
    let validator = world.validator().await;
    assert_eq!(
        (validator.verdict(&before).await, validator.verdict(&during).await, validator.verdict(&after).await),
        (Verdict::Valid, Verdict::Revoked, Verdict::Valid)
    );
}

async fn an_old_schema_is_named_when_migrating_is_off(world: World) {
    // A database that nobody has migrated yet.
    let mut fresh = World::unstarted(world.backend).await;
    fresh.settings.insert("migrate_on_start", "false".to_owned());
    let error = fresh.try_start_server().await.expect_err("old");
    assert!(error.contains("keyward migrate"), "{error}");
    let mut migrate = keyward();
    migrate.arg("migrate");
    for (name, value) in fresh.settings.iter().filter(|(name, _)| !name.contains("listen")) {
        migrate.env(format!("KEYWARD_{}", name.to_uppercase()), value);
    }
    let output = migrate.output().expect("it runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    crate::world::eventually("the database is free again", async || fresh.try_start_server().await.ok()).await;
    assert_eq!(fresh.validator().await.verdict(fresh.root_token()).await, Verdict::Valid);
}

async fn a_missing_or_foreign_keyring_stops_the_start(mut world: World) {
    let (_, secret) = world.admin().await.issue("t", &[]).await;
    world.stop_server().await;
    let keyring = world.folder.path().join("data/keyring");
    let away = world.folder.path().join("away");
    fs::rename(&keyring, &away).expect("moved");
    let error = world.try_start_server().await.expect_err("missing");
    assert!(error.contains("missing") && error.contains("--keyring-file"), "{error}");
    assert!(!keyring.exists(), "no new one is made");
    fs::write(&keyring, format!("A primary {}\n", "07".repeat(32))).expect("writable");
    fs::set_permissions(&keyring, fs::Permissions::from_mode(0o600)).expect("ours");
    let error = world.try_start_server().await.expect_err("foreign");
    assert!(error.contains("not the one"), "{error}");
    fs::write(&keyring, format!("Z primary {}\n", "07".repeat(32))).expect("writable");
    let error = world.try_start_server().await.expect_err("foreign under another name");
    assert!(error.contains("not the one"), "{error}");
    fs::rename(&away, &keyring).expect("moved");
    world.start_server().await;
    assert_eq!(world.validator().await.verdict(&secret).await, Verdict::Valid);
}

async fn a_removed_key_ends_its_tokens(mut world: World) {
    let (_, old) = world.admin().await.issue("old", &[]).await;
    let root = world.root_token().to_owned();
    let rotate = |world: &World| {
        let data = world.folder.path().join("data");
        let output = keyward().args(["keyring", "rotate", "--data-dir"]).arg(data).output().expect("it runs");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    };
    world.stop_server().await;
    rotate(&world);
    world.start_server().await;
    let (_, new) = world.admin().await.issue("new", &[]).await;
    let validator = world.validator().await;
    assert_eq!((validator.verdict(&old).await, validator.verdict(&new).await), (Verdict::Valid, Verdict::Valid));
    let validator_token = validator.token.clone().expect("a token");
    world.stop_server().await;
    let keyring = world.folder.path().join("data/keyring");
    let text = fs::read_to_string(&keyring).expect("readable");
    assert_eq!(fs::metadata(&keyring).expect("there").mode() & 0o777, 0o600);
    let kept: Vec<&str> = text.lines().filter(|line| !line.contains("retired ")).collect();
    fs::write(&keyring, kept.join("\n") + "\n").expect("writable");
    world.start_server().await;
    let validator = world.bearer(&validator_token).await;
    assert_eq!((validator.verdict(&old).await, validator.verdict(&root).await), (Verdict::Unknown, Verdict::Unknown));
    assert_eq!(validator.verdict(&new).await, Verdict::Valid);
}

/// On PostgreSQL there may be several.
#[test]
fn a_second_server_is_kept_away_from_the_embedded_database() {
    world::run(Backend::Sqlite, a_second_server_is_kept_away);
}

async fn a_second_server_is_kept_away(world: World) {
    let second = keyward::server::Server::start(&world.config(), world.clock.clone(), world.limits, |_, _| Ok(())).await;
    let Err(error) = second else { panic!("two servers on one store") };
    assert!(error.contains("another keyward is using"), "{error}");
    assert_eq!(world.validator().await.verdict(world.root_token()).await, Verdict::Valid, "the first goes on");
}

#[test]
fn a_root_token_that_a_file_has_stays_out_of_what_is_not_a_terminal() {
    let folder = tempfile::tempdir().expect("a folder");
    let (data, file) = (folder.path().join("data"), folder.path().join("root"));
    let mut command = serve(&data);
    let (code, said) = refusal(command.arg("--root-token-file").arg(folder.path().join("none/root")));
    assert!(code == 1 && said.contains("none/root cannot be written"), "{code} {said}");
    fs::write(&file, "old, and readable by all").expect("writable");
    let mut command = serve(&data);
    let spawned = command.arg("--root-token-file").arg(&file).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
    let mut server = Process(spawned.expect("it runs"));
    let mut said = String::new();
    let mut lines = BufReader::new(server.0.stdout.take().expect("piped")).lines();
    while !said.contains("validate -") {
        said.push_str(&lines.next().expect("more").expect("text"));
        said.push('\n');
    }
    let token = fs::read_to_string(&file).expect("written");
    assert!(token.starts_with("kw_") && token.trim().len() == 48);
    assert_eq!(fs::metadata(&file).expect("there").mode() & 0o777, 0o600);
    assert!(!said.contains(token.trim()) && said.contains("/root"), "{said}");
}

#[test]
fn a_root_token_that_cannot_be_shown_is_not_made() {
    let folder = tempfile::tempdir().expect("a folder");
    let data = folder.path().join("data");
    let full = fs::OpenOptions::new().write(true).open("/dev/full").expect("a full device");
    let output = serve(&data).stdin(Stdio::null()).stdout(full).stderr(Stdio::piped()).output().expect("it runs");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.code() == Some(1) && said.contains("nothing was created"), "{said}");
    let mut second = Process(serve(&data).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().expect("it runs"));
    let mut lines = BufReader::new(second.0.stdout.take().expect("piped")).lines();
    assert!(lines.any(|line| line.expect("text").contains("kw_")), "the second start shows one");
}

async fn the_root_token_is_shown_once(world: World) {
    let fresh = World::unstarted(world.backend).await;
    let data = fresh.folder.path().join("data");
    let command = || {
        let mut command = serve(&data);
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        if let Some(url) = fresh.settings.get("database_url") {
            command.env("KEYWARD_DATABASE_URL", url);
        }
        command
    };
    let mut first = Process(command().spawn().expect("it runs"));
    let mut said = String::new();
    let mut lines = BufReader::new(first.0.stdout.take().expect("piped")).lines();
    while !said.contains("validate -") {
        said.push_str(&lines.next().expect("more").expect("text"));
        said.push('\n');
    }
    let token = said.lines().map(str::trim).find(|line| line.starts_with("kw_")).expect("a token").to_owned();
    // The two lines that one would type next, as they stand there.
    let typed: Vec<&str> = said.lines().filter(|line| line.contains("export ") || line.contains("validate -")).collect();
    assert_eq!(typed.len(), 2, "{said}");
    let output = Command::new("sh").args(["-c", &typed.join("\n")]).output().expect("a shell");
    assert!(output.status.success(), "{said}\n{}", String::from_utf8_lossy(&output.stderr));
    assert!(String::from_utf8_lossy(&output.stdout).contains("VALID"), "{}", String::from_utf8_lossy(&output.stdout));
    let pid = first.0.id().to_string();
    world::run_as_root(&["kill", "-TERM", &pid]);
    assert!(first.0.wait().expect("an end").success());
    let mut log = String::new();
    first.0.stderr.take().expect("piped").read_to_string(&mut log).expect("text");
    assert!(!log.contains(&token), "{log}");
    let mut second = Process(command().spawn().expect("it runs"));
    let mut stderr = BufReader::new(second.0.stderr.take().expect("piped")).lines();
    while !stderr.next().expect("it serves").expect("text").contains("serving") {}
    world::run_as_root(&["kill", "-TERM", &second.0.id().to_string()]);
    assert!(second.0.wait().expect("an end").success());
    let mut said = String::new();
    second.0.stdout.take().expect("piped").read_to_string(&mut said).expect("text");
    assert!(said.is_empty(), "{said}");
}

async fn a_lost_root_token_is_replaced(mut world: World) {
    let recover = |world: &World| {
        let mut command = keyward();
        command.args(["recover", "--data-dir"]).arg(world.folder.path().join("data"));
        command.args(world.settings.get("database_url").into_iter().flat_map(|url| ["--database-url", url]));
        command.output().expect("it runs")
    };
    let refused = recover(&world);
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    // On PostgreSQL the servers that run hear of it.
    assert!(refused.status.success() != said.contains("another keyward is using"), "{said}");
    assert_eq!(refused.status.success(), world.backend == Backend::Postgres);
    world.stop_server().await;
    world.db_execute("UPDATE token SET state = 3, revoke_time = 0 WHERE is_root").await;
    world.db_execute("UPDATE principal SET suspended = TRUE").await;
    world.db_execute("UPDATE workspace SET suspended = TRUE").await;
    let recovered = recover(&world);
    let secret = String::from_utf8(recovered.stdout).expect("text").trim().to_owned();
    assert!(recovered.status.success() && secret.starts_with("kw_"), "{}", String::from_utf8_lossy(&recovered.stderr));
    world.start_server().await;
    let root = world.bearer(&secret).await;
    let asked = proto::ListAuditEventsRequest { methods: vec!["Recover".to_owned()], ..Default::default() };
    let audit = root.audit().list_audit_events(root.request(asked)).await.expect("an answer");
    assert_eq!(audit.into_inner().events.len(), if world.backend == Backend::Postgres { 2 } else { 1 });
    let nowhere = world.folder.path().join("nowhere");
    let nothing = keyward().args(["recover", "--data-dir"]).arg(&nowhere).output().expect("it runs");
    assert!(!nothing.status.success() && !nowhere.exists(), "{}", String::from_utf8_lossy(&nothing.stderr));
}
