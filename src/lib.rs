//! Keyward: a gRPC authentication service for API tokens. `ARCHITECTURE.md` shows the rooms and who may name whom.

pub mod ambient;
pub mod api;
pub mod audit;
pub mod cache;
pub mod caller;
pub mod cli;
pub mod config;
pub mod directory;
pub mod error;
pub mod fence;
pub mod grant;
pub mod issuer;
pub mod notice;
pub mod notices;
pub mod proto;
pub mod retention;
pub mod rules;
pub mod scope;
pub mod server;
pub mod store;
pub mod telemetry;
pub mod token;
pub mod usage;
pub mod validator;
pub mod workspace;
