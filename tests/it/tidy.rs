//! The house is what `ARCHITECTURE.md` says: who may name whom, who owns which crate, and which test holds which invariant.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
};

/// Crates that one room owns: nobody else names them. `tests/` and `benches/` are not rooms.
const OWNERS: [(&str, &[&str]); 22] = [
    ("base64::", &["api", "token"]),
    ("blake3::", &["token"]),
    ("clap::", &["cli"]),
    ("constant_time_eq::", &["token"]),
    ("crc32fast::", &["token"]),
    ("governor::", &["api"]),
    ("hyper::", &["server"]),
    ("jiff::", &["cli"]),
    ("lettre::", &["notices"]),
    ("percent_encoding::", &["api", "notices"]),
    ("prometheus_client::", &["telemetry"]),
    ("prost_reflect::", &["cli"]),
    ("quick_cache::", &["cache"]),
    ("rand::", &["ambient"]),
    ("reqwest::", &["notices"]),
    ("ring::", &["token"]),
    ("rustls::", &["server"]),
    ("sea_orm", &["store"]),
    ("tonic_reflection::", &["api"]),
    ("toml::", &["config", "cli"]),
    ("tracing_subscriber::", &["telemetry"]),
    ("url::", &["api", "notices", "rules"]),
];

const LINES_MAX: usize = 900;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn read(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn rust_files(folder: &Path) -> Vec<PathBuf> {
    files(folder, &["rs"])
}

fn files(folder: &Path, extensions: &[&str]) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).expect("a folder").flatten() {
        let path = entry.path();
        if path.is_dir() {
            found.extend(files(&path, extensions));
        } else if path.extension().is_some_and(|extension| extensions.iter().any(|wanted| extension == *wanted)) {
            found.push(path);
        }
    }
    found
}

/// The room of a file: `src/store/tokens.rs` is of `store`.
fn room(file: &Path) -> String {
    let inside = file.strip_prefix(root().join("src")).expect("below src");
    inside.iter().next().and_then(|part| part.to_str()).expect("a name").trim_end_matches(".rs").to_owned()
}

/// The rooms in the order of the table in `ARCHITECTURE.md`.
fn rooms() -> Vec<String> {
    let page = read(&root().join("ARCHITECTURE.md"));
    let rows = page.lines().filter(|line| line.starts_with("| ") && line.contains("| `") && !line.contains("`row_"));
    let rooms: Vec<String> = rows
        .flat_map(|row| row.split('|').nth(2).unwrap_or_default().split(','))
        .map(|name| name.trim().trim_matches('`').trim_end_matches('/').to_owned())
        .filter(|name| !name.is_empty())
        .collect();
    assert!(rooms.len() > 15, "the table of rooms was not found: {rooms:?}");
    rooms
}

/// A file's code: without comments, and without its unit tests.
fn code(text: &str) -> String {
    let code = text.split("#[cfg(test)]\nmod tests").next().unwrap_or_default();
    code.lines().filter(|line| !line.trim_start().starts_with("//")).collect::<Vec<_>>().join("\n")
}

/// The rooms that a file names, as `crate::room` or in a `use crate::{…}`.
fn named(code: &str) -> BTreeSet<String> {
    let mut names = BTreeSet::new();
    for (index, _) in code.match_indices("crate::") {
        let rest = &code[index + "crate::".len()..];
        if let Some(group) = rest.strip_prefix('{') {
            let mut depth = 1;
            let mut item = String::new();
            for letter in group.chars() {
                match letter {
                    '{' => depth += 1,
                    '}' => depth -= 1,
                    ',' if depth == 1 => names.extend(first_word(&std::mem::take(&mut item))),
                    letter if depth == 1 => item.push(letter),
                    _ => {}
                }
                if depth == 0 {
                    break;
                }
            }
            names.extend(first_word(&item));
        } else {
            names.extend(first_word(rest));
        }
    }
    names
}

fn first_word(text: &str) -> Option<String> {
    let word: String = text.trim().chars().take_while(|letter| letter.is_alphanumeric() || *letter == '_').collect();
    (!word.is_empty()).then_some(word)
}

#[test]
fn rooms_import_upwards_only() {
    let rooms = rooms();
    let floor = |name: &str| rooms.iter().position(|room| room == name);
    for file in rust_files(&root().join("src")) {
        let own = room(&file);
        if own == "lib" {
            continue;
        }
        let own_floor = floor(&own).unwrap_or_else(|| panic!("{} is in no room of ARCHITECTURE.md", file.display()));
        for name in named(&code(&read(&file))) {
            let other = floor(&name).unwrap_or_else(|| panic!("{} names {name}, which is no room", file.display()));
            assert!(other <= own_floor, "{} names `{name}`, which lies below `{own}`", file.display());
            let forbidden = own == "api" && (name == "store" || name == "cache");
            assert!(!forbidden, "{} names `{name}`: api only translates", file.display());
        }
    }
}

#[test]
fn every_room_has_its_source() {
    let present: BTreeSet<String> = rust_files(&root().join("src")).iter().map(|file| room(file)).filter(|room| room != "lib").collect();
    assert_eq!(rooms().into_iter().collect::<BTreeSet<_>>(), present);
}

#[test]
fn owners_are_alone() {
    for file in rust_files(&root().join("src")) {
        let (own, text) = (room(&file), code(&read(&file)));
        for (name, owners) in OWNERS {
            let starts = text
                .match_indices(name)
                .filter(|(index, _)| !text[..*index].ends_with(|letter: char| letter.is_alphanumeric() || letter == '_' || letter == ':'));
            assert!(starts.count() == 0 || owners.contains(&own.as_str()), "{} names {name}, which belongs to {owners:?}", file.display());
        }
    }
}

#[test]
fn every_file_says_what_it_answers() {
    for file in rust_files(&root().join("src")).into_iter().chain(rust_files(&root().join("tests"))) {
        let text = read(&file);
        assert!(text.starts_with("//! "), "{} does not open with //!", file.display());
        assert!(text.lines().count() <= LINES_MAX, "{} has {} lines", file.display(), text.lines().count());
    }
}

/// An invariant whose test was renamed or removed is an invariant no more.
#[test]
fn every_invariant_names_a_test_that_exists() {
    let files: Vec<PathBuf> = ["src", "tests"].iter().flat_map(|folder| rust_files(&root().join(folder))).collect();
    let texts: BTreeMap<&PathBuf, String> = files.iter().map(|file| (file, read(file))).collect();
    let tests: BTreeSet<&str> = texts
        .values()
        .flat_map(|text| text.split("fn ").skip(1))
        .filter_map(|rest| rest.split(|letter: char| !letter.is_alphanumeric() && letter != '_').next())
        .collect();
    let mut invariants = 0;
    for (file, text) in &texts {
        let head: String = text
            .lines()
            .take_while(|line| line.starts_with("//!"))
            .map(|line| line.trim_start_matches("//!").trim())
            .collect::<Vec<_>>()
            .join(" ");
        invariants += head.matches("Invariant:").count();
        for quoted in
            head.split("(test").skip(1).filter_map(|part| part.split(')').next()).flat_map(|names| names.split('`').skip(1).step_by(2))
        {
            assert!(tests.contains(quoted), "{} names the test `{quoted}`, which does not exist", file.display());
        }
    }
    assert!(invariants > 20, "only {invariants} invariants were found");
}

#[test]
fn every_row_of_what_works_has_its_test() {
    let (page, rows) = (read(&root().join("ARCHITECTURE.md")), read(&root().join("tests/it/rows.rs")));
    let tests: BTreeSet<&str> = rows.split("async fn row_").skip(1).filter_map(|rest| rest.split('(').next()).collect();
    let named: BTreeSet<&str> = page.split("`row_").skip(1).filter_map(|rest| rest.split('`').next()).collect();
    assert!(named.len() > 15, "the table of rows was not found: {named:?}");
    assert_eq!(named, tests);
}

#[test]
fn the_readme_shows_every_setting() {
    let readme = read(&root().join("README.md"));
    for setting in &keyward::config::SETTINGS {
        let default = if setting.default.is_empty() { "none".to_owned() } else { format!("`{}`", setting.default) };
        let row = format!("| `{setting}` | {default} | {} |", setting.help);
        assert!(readme.lines().any(|line| line == row), "the README lacks the row\n{row}");
    }
}

/// `KEYWARD_PORT` is what must not come from elsewhere.
#[test]
fn files_to_run_servers_name_settings_that_exist() {
    let others = ["KEYWARD_ADDRESS", "KEYWARD_TOKEN", "KEYWARD_CA_FILE", "KEYWARD_PORT"];
    let names: BTreeSet<String> = keyward::config::SETTINGS
        .iter()
        .flat_map(|setting| std::iter::once(setting.to_string()).chain(setting.secret.then(|| format!("{setting}_FILE"))))
        .chain(others.map(str::to_owned))
        .collect();
    let mut seen = BTreeSet::new();
    for path in files(&root().join("deploy"), &["md", "yaml", "example"]) {
        let text = read(&path);
        for word in text.split(|letter: char| !(letter.is_ascii_uppercase() || letter == '_')).filter(|word| word.starts_with("KEYWARD_")) {
            assert!(names.contains(word), "{}: there is no {word}", path.display());
            seen.insert(word.to_owned());
        }
    }
    assert!(seen.len() > 10, "{seen:?}");
}

#[test]
fn every_dependency_says_why_it_is_there() {
    let manifest = read(&root().join("Cargo.toml"));
    let mut explained = false;
    let mut inside = false;
    for line in manifest.lines() {
        if line.starts_with('[') {
            inside = line.contains("dependencies]");
            explained = false;
        } else if inside && line.starts_with('#') {
            explained = true;
        } else if inside && !line.is_empty() {
            assert!(explained, "{line} is not explained");
        }
    }
}
