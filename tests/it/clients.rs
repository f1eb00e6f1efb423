//! Clients that nobody here wrote: grpcurl by reflection alone, Python's grpcio, Node's grpc-js, each as a user would use it.

use std::{path::Path, process::Command};

use crate::world::{Backend, World, runtime, skip, tools};

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
