//! `keyward replica …`: the servers that work on one database.

use clap::{Arg, ArgMatches, Command};
use tonic::transport::Channel;

use super::{
    arguments::{command, text},
    connection::{self, Connection},
    failure::{Exit, Failure},
    session::Session,
};
use crate::proto::{ListReplicasRequest, ReleaseReplicaRequest, replica_service_client::ReplicaServiceClient};

pub(super) fn replica_command() -> Command {
    Command::new("replica")
        .about("Shows the servers of a database, and ends the wait for one that is gone")
        .subcommand_required(true)
        .arg_required_else_help(true)
        .subcommands([list_command(), release_command()])
        .args(connection::args().map(|arg| arg.global(true)))
}

fn list_command() -> Command {
    command("list", "Lists servers, the oldest first", "  keyward replica list\n  keyward replica list --output json")
}

fn release_command() -> Command {
    let about = "Says that a server does not run any more, so that changes do not wait for it; make sure of that first";
    command("release", about, "  keyward replica release evt_0123456789abcdefghijkl")
        .arg(Arg::new("id").value_name("ID").required(true).help("Which server, as keyward replica list shows it"))
}

pub(super) async fn list(args: &ArgMatches, session: &mut Session<'_>) -> Result<Exit, Failure> {
    let (connection, mut client) = replicas(args, session).await?;
    let answer = client.list_replicas(connection.request(ListReplicasRequest {})).await?.into_inner();
    session.answer(&answer)
}

pub(super) async fn release(args: &ArgMatches, session: &mut Session<'_>) -> Result<Exit, Failure> {
    let (connection, mut client) = replicas(args, session).await?;
    let message = ReleaseReplicaRequest { id: text(args, "id") };
    let answer = client.release_replica(connection.request(message)).await?.into_inner();
    session.answer(&answer)
}

async fn replicas(args: &ArgMatches, session: &mut Session<'_>) -> Result<(Connection, ReplicaServiceClient<Channel>), Failure> {
    let connection = Connection::open(args, session).await?;
    let client = ReplicaServiceClient::new(connection.channel());
    Ok((connection, client))
}
