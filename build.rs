//! Compiles `proto/` with protox, so that no protoc needs to be installed.

#![expect(clippy::disallowed_methods, reason = "cargo speaks to a build script through its environment")]

use std::{env, error::Error, fs, path::PathBuf};

const FILES: [&str; 9] = [
    "envoy/service/auth/v3/external_auth.proto",
    "keyward/v1/audit_service.proto",
    "keyward/v1/notice_service.proto",
    "keyward/v1/principal_service.proto",
    "keyward/v1/replica_service.proto",
    "keyward/v1/self_service.proto",
    "keyward/v1/token_service.proto",
    "keyward/v1/validation_service.proto",
    "keyward/v1/workspace_service.proto",
];

/// Messages that carry a token: their derived `Debug` would print it. `api` writes one that does not.
const SECRET: [&str; 11] = [
    "envoy.service.auth.v3.AttributeContext.HttpRequest",
    "envoy.service.auth.v3.HeaderValue",
    "keyward.v1.ValidateTokenRequest",
    "keyward.v1.BatchValidateTokensRequest",
    "keyward.v1.CreateTokenResponse",
    "keyward.v1.RegenerateTokenResponse",
    "keyward.v1.RegenerateSelfResponse",
    "keyward.v1.CreateMyTokenResponse",
    "keyward.v1.IssueTemporaryTokenResponse",
    "keyward.v1.ReportLeakedTokensRequest",
    "keyward.v1.RotateWebhookSecretResponse",
];

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed=proto");
    let mut compiler = protox::Compiler::new(["proto"])?;
    // Source info carries the comments, which `grpcurl describe` shows.
    compiler.include_source_info(true).include_imports(true).open_files(FILES)?;
    let out = PathBuf::from(env::var("OUT_DIR")?);
    fs::write(out.join("descriptors.bin"), compiler.encode_file_descriptor_set())?;

    let mut config = tonic_prost_build::Config::new();
    config.skip_debug(SECRET);
    let builder = tonic_prost_build::configure().btree_map(".").extern_path(".google.rpc", "::tonic_types::pb");
    builder.compile_fds_with_config(compiler.file_descriptor_set(), config)?;
    Ok(())
}
