//! Clients that nobody here wrote: grpcurl by reflection alone, Python's grpcio, Node's grpc-js, each as a user would use it.

use std::{
    fs,
    io::Write as _,
    path::Path,
    process::{Command, Stdio},
};

use keyward::proto;
use serde_json::{Value, json};

use crate::world::{Backend, World, new_token, runtime, skip, tools};

/// Runs a driver of `tests/clients` against a server.
fn drive(program: impl FnOnce(&Path) -> Option<Command>, missing: &str) {
    let Some(tools) = tools() else { return skip(missing) };
    let Some(mut command) = program(&tools) else { return skip(missing) };
    runtime().block_on(async {
        let mut world = World::start_by_the_real_clock(Backend::Sqlite).await;
        world.settings.insert("notices_interval", "1s".to_owned());
        world.restart().await;
        command.env("KEYWARD_ADDRESS", world.server().address().to_string()).env("KEYWARD_TOKEN", world.root_token());
        command.env("KEYWARD_TEST_TOOLS", &tools);
        let output = tokio::task::spawn_blocking(move || command.output()).await.expect("no panic").expect("it runs");
        let said = [output.stdout, output.stderr].concat();
        let said = String::from_utf8_lossy(&said);
        assert!(output.status.success(), "{said}");
        assert!(!said.contains(world.root_token()), "a secret on the screen: {said}");
        println!("{said}");
    });
}

fn script(path: &str) -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/clients").join(path)
}

#[test]
fn python_drives_every_method() {
    drive(
        |tools| {
            let python = tools.join("venv/bin/python");
            let mut command = Command::new(&python);
            command.arg("-B").arg(script("python/drive.py"));
            python.exists().then_some(command)
        },
        "no Python client (tests/run installs it)",
    );
}

#[test]
fn node_drives_the_main_story() {
    drive(
        |_| {
            let mut command = Command::new("node");
            command.arg(script("node/drive.js"));
            script("node/node_modules").exists().then_some(command)
        },
        "no Node.js client (tests/run installs it)",
    );
}

#[test]
fn grpcurl_needs_nothing_but_reflection() {
    drive(
        |tools| {
            let mut command = Command::new("bash");
            command.arg(script("grpcurl/drive.sh"));
            tools.join("bin/grpcurl").exists().then_some(command)
        },
        "no grpcurl (tests/run installs it)",
    );
}

/// What a client of RFC 7662 is told of a token.
fn introspected(mut command: Command, world: &World, credentials: &str, token: &str) -> Result<Value, String> {
    let base = format!("http://{}", world.server().http_address().expect("HTTP is on"));
    command.env("KEYWARD_HTTP", base).env("KEYWARD_TOKEN", credentials);
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("it runs");
    child.stdin.take().expect("piped").write_all(token.as_bytes()).expect("read");
    let output = child.wait_with_output().expect("an end");
    let said = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    if output.status.success() { Ok(serde_json::from_slice(&output.stdout).expect("JSON")) } else { Err(said(&output.stderr)) }
}

#[test]
fn clients_of_introspection_understand_the_answers() {
    let Some(tools) = tools() else { return skip("no clients of RFC 7662 (tests/run installs them)") };
    let (python, modules) = (tools.join("venv/bin/python"), script("node/node_modules/openid-client"));
    if !python.exists() || !modules.exists() {
        return skip("no clients of RFC 7662 (tests/run installs them)");
    }
    let authlib = || {
        let mut command = Command::new(&python);
        command.arg("-B").arg(script("gateways/introspect.py"));
        command
    };
    let openid_client = || {
        let mut command = Command::new("node");
        command.arg(script("node/introspect.mjs"));
        command
    };
    runtime().block_on(async {
        let world = World::start_by_the_real_clock(Backend::Sqlite).await;
        let validator = world.validator().await.token.expect("a token");
        let request = proto::CreateTokenRequest {
            principal: "alice".to_owned(),
            audiences: vec!["shop".to_owned()],
            ..new_token("t", &["orders:read", "orders:write"])
        };
        let made = world.root().await.create(request).await.expect("created");
        let (token, seconds) = (made.token.expect("a token"), |time: Option<prost_types::Timestamp>| time.expect("a time").seconds);
        let expected = json!({
            "active": true,
            "scope": "orders:read orders:write",
            "client_id": "alice",
            "username": "alice",
            "token_type": "Bearer",
            "exp": seconds(token.expire_time),
            "iat": seconds(token.create_time),
            "sub": "alice",
            "aud": ["shop"],
            "iss": "urn:keyward:default",
            "jti": token.id,
        });
        for command in [&authlib as &dyn Fn() -> Command, &openid_client] {
            assert_eq!(introspected(command(), &world, &validator, &made.secret).as_ref(), Ok(&expected));
            assert_eq!(introspected(command(), &world, &validator, "garbage"), Ok(json!({"active": false})));
            let refused = introspected(command(), &world, "garbage", &made.secret).expect_err("bad credentials");
            assert!(refused.contains("401"), "{refused}");
        }
        world.root().await.revoke(&token.id).await.expect("revoked");
        for command in [&authlib as &dyn Fn() -> Command, &openid_client] {
            assert_eq!(introspected(command(), &world, &validator, &made.secret), Ok(json!({"active": false})), "revoked a moment ago");
        }
    });
}

#[test]
fn resources_of_gateways_fit_their_schemas() {
    if !script("node/node_modules/@kubernetes-models").exists() {
        return skip("no schemas of Kubernetes resources (tests/run installs them)");
    }
    let folder = tempfile::tempdir().expect("a folder");
    let check = |text: &str| {
        let file = folder.path().join("resources.yaml");
        fs::write(&file, text).expect("written");
        let output = Command::new("node").arg(script("node/resources.mjs")).arg(file).output().expect("it runs");
        output.status.success().then_some(()).ok_or_else(|| String::from_utf8_lossy(&output.stderr).into_owned())
    };
    for (name, wrong) in [
        (
            "envoy-gateway.yaml",
            [("timeout: 200ms", "timeout: 200"), ("failOpen: false", "failopen: false"), ("type: Value, value: shop", "value: shop")],
        ),
        ("istio.yaml", [("action: CUSTOM", "action: custom"), ("notPaths:", "notPath:"), ("mode: MUTUAL", "mode: mutual")]),
    ] {
        let text = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("deploy/gateways").join(name)).expect(name);
        assert_eq!(check(&text), Ok(()), "{name}");
        for (usual, wrong) in wrong {
            assert!(text.contains(usual), "{name}: {usual}");
            assert!(check(&text.replace(usual, wrong)).is_err(), "{name} with {wrong}");
        }
    }
}
