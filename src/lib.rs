//! Keyward: a gRPC authentication service for API tokens. `ARCHITECTURE.md` shows the rooms and who may name whom.

pub mod ambient;
pub mod cache;
pub mod caller;
pub mod cli;
pub mod config;
pub mod error;
pub mod grant;
pub mod issuer;
pub mod proto;
pub mod scope;
pub mod store;
pub mod token;
pub mod usage;
pub mod validator;
pub mod api;
pub mod telemetry;
pub mod server;
