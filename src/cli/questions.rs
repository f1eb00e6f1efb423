//! `keyward health`, `whoami` and `validate`: commands that ask and change nothing.

use clap::{Arg, ArgMatches, Command};
use tonic::Code;
use tonic_health::pb::{HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient};

use super::{
    arguments::{command, list, option, switch, text, texts},
    connection::{self, Connection, token_is_on_stdin},
    failure::{Exit, Failure},
    session::{Format, Session},
};
use crate::{
    proto::{
        ValidateTokenRequest, WhoAmIRequest, self_service_client::SelfServiceClient, validation_service_client::ValidationServiceClient,
    },
    token::Secret,
};

pub(super) fn health_command() -> Command {
    let examples = "  keyward health && echo ready\n  keyward health --service keyward.v1.ValidationService";
    command("health", "Asks whether a server is ready (grpc.health.v1); needs no token", examples)
        .arg(option("service", "NAME", "One service of the server, such as keyward.v1.TokenService [default: the whole server]"))
        .args(connection::open_args())
}

pub(super) fn whoami_command() -> Command {
    command("whoami", "Shows who you are to Keyward, and what you may do", "  keyward whoami\n  keyward whoami --token - < token.txt")
        .args(connection::args())
}

pub(super) fn validate_command() -> Command {
    let examples = "  keyward validate - < token.txt\n  \
                    echo \"$TOKEN\" | keyward validate --audience orders --scope orders:read\n  \
                    keyward validate \"$TOKEN\" --method GET --path /api/agent-base/7/executions\n  \
                    keyward validate \"$TOKEN\" --peek --output json";
    command("validate", "Asks whether a token is good, whose it is and what it may do; exit code 0 if it is good, 1 if not", examples)
        .arg(
            Arg::new("subject")
                .value_name("TOKEN")
                .help("The token to judge; - or nothing reads it from standard input, which other users cannot see"),
        )
        .arg(option("audience", "PRODUCT", "The product that it is presented to"))
        .arg(list("scope", "SCOPE", "A scope that this use needs, such as orders:read; repeat it for more"))
        .arg(option("method", "METHOD", "The method of the HTTP request that it came with, such as GET").requires("path"))
        .arg(
            option("path", "PATH", "The path of that request, as it was received: the use then needs the scope of its route")
                .requires("method"),
        )
        .arg(option("client-ip", "ADDRESS", "The address of the client that presented it"))
        .arg(switch("peek", "Do not count this as a use of the token"))
        .args(connection::args())
}

pub(super) async fn health(args: &ArgMatches, session: &mut Session<'_>) -> Result<Exit, Failure> {
    let connection = Connection::open_bare(args, session).await?;
    let request = connection.request(HealthCheckRequest { service: text(args, "service") });
    let status = match HealthClient::new(connection.channel()).check(request).await {
        Ok(response) => response.into_inner().status().as_str_name(),
        Err(status) if status.code() == Code::NotFound => ServingStatus::ServiceUnknown.as_str_name(),
        Err(status) => return Err(status.into()),
    };
    session.write(&match session.format {
        Format::Json => format!("{{\n  \"status\": \"{status}\"\n}}\n"),
        Format::Table => format!("{status}\n"),
    })?;
    Ok(if status == ServingStatus::Serving.as_str_name() { Exit::Good } else { Exit::Refused })
}

pub(super) async fn whoami(args: &ArgMatches, session: &mut Session<'_>) -> Result<Exit, Failure> {
    let connection = Connection::open(args, session).await?;
    let answer = SelfServiceClient::new(connection.channel()).who_am_i(connection.request(WhoAmIRequest {})).await?;
    session.answer(&answer.into_inner())
}

pub(super) async fn validate(args: &ArgMatches, session: &mut Session<'_>) -> Result<Exit, Failure> {
    let subject = subject(args, session)?;
    let connection = Connection::open(args, session).await?;
    let request = ValidateTokenRequest {
        token: subject.reveal().to_owned(),
        audience: text(args, "audience"),
        required_scopes: texts(args, "scope"),
        http_method: text(args, "method"),
        path: text(args, "path"),
        client_ip: text(args, "client-ip"),
        peek: args.get_flag("peek"),
    };
    let answer = ValidationServiceClient::new(connection.channel()).validate_token(connection.request(request)).await?.into_inner();
    session.answer(&answer)?;
    Ok(if answer.is_good() { Exit::Good } else { Exit::Refused })
}

/// The token to judge.
fn subject(args: &ArgMatches, session: &mut Session<'_>) -> Result<Secret, Failure> {
    match args.get_one::<String>("subject") {
        Some(token) if token != "-" => Ok(Secret::from(token.clone())),
        _ if token_is_on_stdin(args, session) => Err(Failure::usage(
            "standard input can hold one token only: give your own with KEYWARD_TOKEN_FILE, or the one to judge as an argument",
        )),
        _ => session.read_token(),
    }
}
