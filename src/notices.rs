//! How a workspace is told of its tokens: by mails and by calls of its webhook.

pub mod letter;
pub mod mail;
pub mod reach;
pub mod webhook;
mod words;
