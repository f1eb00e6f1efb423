//! The binary `keyward`: the command line, and behind it the server.

use std::process::ExitCode;

fn main() -> ExitCode {
    keyward::cli::run(std::env::args_os())
}
