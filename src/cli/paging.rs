//! Lists that come in pages: how many entries are wanted, and fetching pages until they are there.

use clap::{Arg, ArgMatches, value_parser};
use tonic::Status;

use super::{
    arguments::{option, switch, text},
    failure::Failure,
    session::Session,
};

const PAGE_SIZE_MAX: u32 = 1_000;

pub(super) fn args() -> [Arg; 3] {
    [
        option("limit", "COUNT", "At most this many [default: 50]").value_parser(value_parser!(u32).range(1..)).conflicts_with("all"),
        switch("all", "All of them"),
        page_token(),
    ]
}

pub(super) fn page_token() -> Arg {
    option("page-token", "TOKEN", "Go on where the list with this nextPageToken ended")
}

/// Fetches pages until there are as many entries as wanted, or no more.
pub(super) async fn pages<T>(
    args: &ArgMatches,
    page: impl AsyncFn(i32, String) -> Result<(Vec<T>, String), Status>,
) -> Result<(Vec<T>, String), Failure> {
    let mut wanted = if args.get_flag("all") { u32::MAX } else { args.get_one("limit").copied().unwrap_or(50) };
    let (mut entries, mut next) = (Vec::new(), text(args, "page-token"));
    loop {
        let page_size = i32::try_from(wanted.min(PAGE_SIZE_MAX)).unwrap_or_default();
        let (more, token) = page(page_size, next).await?;
        wanted = wanted.saturating_sub(u32::try_from(more.len()).unwrap_or(u32::MAX));
        entries.extend(more);
        next = token;
        if next.is_empty() || wanted == 0 {
            return Ok((entries, next));
        }
    }
}

/// Says what an empty table would not, and what is left.
pub(super) fn remark<T>(session: &mut Session<'_>, what: &str, entries: &[T], next_page_token: &str) {
    if entries.is_empty() {
        session.remark(&format!("There are no such {what}."));
    }
    if !next_page_token.is_empty() {
        session.remark("There are more: --limit COUNT or --all shows them.");
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use clap::Command;

    use super::*;

    /// Lists 2,500 entries, and says which page sizes were asked for and what is left.
    fn listed(arguments: &[&str]) -> (usize, Vec<i32>, String) {
        let args = Command::new("list").no_binary_name(true).args(args()).try_get_matches_from(arguments).expect("well formed");
        let asked = RefCell::new(Vec::new());
        let page = async |size: i32, token: String| {
            asked.borrow_mut().push(size);
            let start: usize = token.parse().unwrap_or(0);
            let end = 2_500.min(start + usize::try_from(size).expect("small"));
            let next = if end < 2_500 { end.to_string() } else { String::new() };
            Ok((vec![(); end - start], next))
        };
        let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
        let (entries, next) = runtime.block_on(pages(&args, page)).expect("pages");
        (entries.len(), asked.into_inner(), next)
    }

    #[test]
    fn pages_are_followed_as_far_as_wanted() {
        assert_eq!(listed(&[]), (50, vec![50], "50".to_owned()));
        assert_eq!(listed(&["--limit", "1200"]), (1_200, vec![1_000, 200], "1200".to_owned()));
        assert_eq!(listed(&["--all"]), (2_500, vec![1_000; 3], String::new()));
        assert_eq!(listed(&["--limit", "9", "--page-token", "2495"]), (5, vec![9], String::new()));
    }
}
