//! The command line of Keyward.

fn main() {}
