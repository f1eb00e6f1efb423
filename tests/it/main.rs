//! The integration tests: the production server, on both databases, through its gRPC interface.

#![allow(
    clippy::disallowed_methods,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::print_stdout,
    clippy::print_stderr,
    clippy::too_many_lines,
    clippy::cast_possible_truncation,
    clippy::cast_possible_wrap,
    clippy::cast_precision_loss,
    clippy::cast_sign_loss,
    clippy::float_cmp,
    clippy::unchecked_time_subtraction,
    clippy::unnecessary_wraps,
    clippy::needless_pass_by_value,
    reason = "a test fails by panicking, waits by the real clock, and reads best in one piece"
)]

mod acts;
mod cli;
mod clients;
mod contract;
mod crash;
mod domain;
mod equipment;
mod equivalence;
mod fence;
mod front;
mod fronts;
mod gateways;
mod hot;
mod keeping;
mod limits;
mod mailbox;
mod mails;
mod model;
mod newenemy;
mod notices;
mod outlets;
mod people;
mod plans;
mod pooler;
mod process;
mod proxy;
mod receiver;
mod receivers;
mod replicas;
mod rows;
mod scale;
mod scans;
mod secrets;
mod self_service;
mod signature;
mod signed;
mod startup;
mod streams;
mod tables;
mod tidy;
mod tls;
mod tokens;
mod upstream;
mod validation;
mod walls;
mod watchers;
mod wishes;
mod world;
