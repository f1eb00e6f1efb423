//! The settings of a workspace as a TOML file: name, policy, notices, resources.
//!
//! Invariant: a file that was written from a workspace says just that workspace (test `what_was_written_is_read`), and a file with a
//! mistake says nothing at all (test `mistakes_name_the_key_and_the_fix`).

mod notices;
mod routes;

use std::fmt::Write as _;

use toml::{Table, Value};

use super::{
    expiry,
    failure::Failure,
    mask,
    policy::{self, TOKENS_MAX, ttl},
    table::{escape, is_steering},
};
use crate::{
    error::{Error, Violations},
    proto::{Policy, Workspace},
};

const KEYS: [&str; 4] = ["display_name", "policy", "notices", "resources"];
const NAME_CHARS_MAX: usize = 100;

/// What a file says: the settings, and the fields of the update mask for them.
#[derive(Default, Debug)]
pub(super) struct Sheet {
    pub workspace: Workspace,
    pub paths: Vec<String>,
}

/// Reads a file.
///
/// # Errors
/// A usage failure that names every mistake.
pub(super) fn read(name: &str, text: &str) -> Result<Sheet, Failure> {
    let table = text.parse::<Table>().map_err(|error| not_toml(name, text, &error))?;
    let mut reader = Reader::default();
    reader.sheet(&table);
    if let Err(Error::Invalid(violations)) = reader.mistakes.finish() {
        return Err(Failure::mistakes(format!("{name} cannot be loaded; nothing was changed"), violations));
    }
    if reader.sheet.paths.is_empty() {
        return Err(Failure::usage(format!("{name} has nothing to load: it can have display_name, [policy], [notices] and [[resources]]")));
    }
    Ok(reader.sheet)
}

/// The text of the error itself would show the line, which may hold a token if the wrong file was given.
fn not_toml(name: &str, text: &str, error: &toml::de::Error) -> Failure {
    let start = error.span().map_or(0, |span| span.start);
    let line = text.bytes().take(start).filter(|byte| *byte == b'\n').count() + 1;
    Failure::usage(format!("{name} is not TOML: line {line}: {}", mask(error.message()).replace('\n', ", ")))
}

#[derive(Default)]
struct Reader {
    sheet: Sheet,
    mistakes: Violations,
}

impl Reader {
    fn sheet(&mut self, table: &Table) {
        self.known("", table, &KEYS);
        if let Some(name) = table.get("display_name").and_then(|value| self.checked("display_name", value, is_name)) {
            self.sheet.workspace.display_name = name;
            self.sheet.paths.push("display_name".to_owned());
        }
        match table.get("policy") {
            None => {}
            Some(Value::Table(policy)) => self.policy(policy),
            Some(_) => self.mistakes.add("policy", "must be a table: [policy], and its settings in the lines below"),
        }
        match table.get("notices") {
            None => {}
            Some(Value::Table(notices)) => self.notices(notices),
            Some(_) => self.mistakes.add("notices", "must be a table: [notices], and its settings in the lines below"),
        }
        match table.get("resources") {
            None => {}
            Some(Value::Array(resources)) => self.resources(resources),
            Some(_) => self.mistakes.add("resources", "must be tables: [[resources]], and one resource in the lines below"),
        }
    }

    fn known(&mut self, path: &str, table: &Table, keys: &[&str]) {
        for key in table.keys().filter(|key| !keys.contains(&key.as_str())) {
            self.mistakes
                .add(format!("{path}{}", mask(key)), format!("is not known here: take it out, or name one of {}", keys.join(", ")));
        }
    }

    fn policy(&mut self, table: &Table) {
        self.known("policy.", table, &policy::KEYS);
        let mut policy = Policy::default();
        for key in policy::KEYS {
            let Some(value) = table.get(key) else { continue };
            let field = format!("policy.{key}");
            match key {
                "default_ttl" => policy.default_ttl = self.span(&field, value),
                "max_permanent_ttl" => policy.max_permanent_ttl = self.span(&field, value),
                "max_temporary_ttl" => policy.max_temporary_ttl = self.span(&field, value),
                "allow_never" => policy.allow_never = self.truth(&field, value).unwrap_or_default(),
                "permanent_requires_admin" => policy.permanent_requires_admin = self.truth(&field, value).unwrap_or_default(),
                "principals_on_first_use" => policy.principals_on_first_use = self.truth(&field, value),
                _ => policy.max_tokens_per_principal = self.count(&field, value).unwrap_or_default(),
            }
            self.sheet.paths.push(field);
        }
        self.sheet.workspace.policy = Some(policy);
    }

    fn text(&mut self, field: &str, value: &Value) -> Option<String> {
        self.mistakes.take(field, value.as_str().map(str::to_owned).ok_or("must be a text in quotes"))
    }

    fn checked(&mut self, field: &str, value: &Value, check: fn(&str) -> Result<(), &'static str>) -> Option<String> {
        let text = self.text(field, value)?;
        self.mistakes.take(field, check(&text)).map(|()| text)
    }

    fn span(&mut self, field: &str, value: &Value) -> Option<prost_types::Duration> {
        let text = value.as_str().ok_or_else(|| "must be a span in quotes, such as \"90d\" or \"12h\"".to_owned());
        let span = text.and_then(ttl).and_then(|span| expiry::span_to_wire(span).map_err(|_| "is too long".to_owned()));
        self.mistakes.take(field, span.map_err(|rule| mask(&rule)))
    }

    fn truth(&mut self, field: &str, value: &Value) -> Option<bool> {
        self.mistakes.take(field, value.as_bool().ok_or("must be true or false, without quotes"))
    }

    fn count(&mut self, field: &str, value: &Value) -> Option<i32> {
        let count = value.as_integer().filter(|count| (1..=TOKENS_MAX).contains(count)).and_then(|count| i32::try_from(count).ok());
        self.mistakes.take(field, count.ok_or_else(|| format!("must be a number from 1 to {TOKENS_MAX}, without quotes")))
    }
}

fn is_name(text: &str) -> Result<(), &'static str> {
    let fits = (1..=NAME_CHARS_MAX).contains(&text.trim().chars().count());
    if fits { Ok(()) } else { Err("must have 1 to 100 characters") }
}

/// Writes the settings of a workspace, so that `read` takes them back.
pub(super) fn write(workspace: &Workspace) -> String {
    let id = escape(&workspace.id);
    let mut text = format!(
        "# The settings of the workspace {id}. `keyward workspace import {id} FILE` loads them:\n\
         # what is left out stays as it is, and the resources are replaced as a whole.\n\n\
         display_name = {}\n",
        quoted(&workspace.display_name)
    );
    if workspace.resources.is_empty() {
        text.push_str("resources = []\n");
    }
    if let Some(policy) = &workspace.policy {
        write_policy(policy, &mut text);
    }
    if let Some(notices) = &workspace.notices {
        notices::write(notices, &mut text);
    }
    for resource in &workspace.resources {
        routes::write(resource, &mut text);
    }
    text
}

// Writing to a String cannot fail.
fn write_policy(policy: &Policy, text: &mut String) {
    text.push_str("\n[policy]\n");
    let spans = [
        ("default_ttl", &policy.default_ttl),
        ("max_permanent_ttl", &policy.max_permanent_ttl),
        ("max_temporary_ttl", &policy.max_temporary_ttl),
    ];
    for (key, span) in spans {
        let Some(span) = span else { continue };
        let _ = match expiry::span_text(span) {
            Some(span) => writeln!(text, "{key} = \"{span}\""),
            None => writeln!(text, "# {key} is left out: {span} is not of whole seconds"),
        };
    }
    let _ = writeln!(text, "allow_never = {}\npermanent_requires_admin = {}", policy.allow_never, policy.permanent_requires_admin);
    if let Some(truth) = policy.principals_on_first_use {
        let _ = writeln!(text, "principals_on_first_use = {truth}");
    }
    if policy.max_tokens_per_principal > 0 {
        let _ = writeln!(text, "max_tokens_per_principal = {}", policy.max_tokens_per_principal);
    }
}

/// A basic string of TOML, in which nothing can steer a terminal either.
fn quoted(text: &str) -> String {
    let mut quoted = String::with_capacity(text.len() + 2);
    quoted.push('"');
    for character in text.chars() {
        match character {
            '"' | '\\' => quoted.extend(['\\', character]),
            character if is_steering(character) => {
                let _ = write!(quoted, "\\u{:04x}", u32::from(character));
            }
            character => quoted.push(character),
        }
    }
    quoted.push('"');
    quoted
}

#[cfg(test)]
const EXAMPLE: &str = include_str!("../../deploy/workspaces/agent-platform.toml");

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        cli::{failure::Exit, session::Format},
        proto::{Notices, Operation, Resource},
    };

    fn printed(failure: &Failure) -> String {
        let mut err = Vec::new();
        failure.print(Format::Table, &mut err);
        String::from_utf8(err).expect("text")
    }

    /// The settings that a file holds, without those that belong to the server.
    fn settings(workspace: &Workspace) -> Workspace {
        let Workspace { display_name, policy, notices, resources, .. } = workspace.clone();
        Workspace { display_name, policy, notices, resources, ..Workspace::default() }
    }

    fn resource(name: &str, endpoint: &str, operations: &[[&str; 3]]) -> Resource {
        let operation = |[operation, method, path]: &[&str; 3]| Operation {
            operation: (*operation).to_owned(),
            method: (*method).to_owned(),
            path: (*path).to_owned(),
        };
        Resource { resource: name.to_owned(), endpoint: endpoint.to_owned(), operations: operations.iter().map(operation).collect() }
    }

    fn workspace(name: &str) -> Workspace {
        let span = |seconds| Some(prost_types::Duration { seconds, nanos: 0 });
        Workspace {
            id: "acme".to_owned(),
            display_name: name.to_owned(),
            prefix: "acm".to_owned(),
            policy: Some(Policy {
                default_ttl: span(90 * 86_400),
                max_permanent_ttl: span(365 * 86_400 + 1),
                max_temporary_ttl: span(5_400),
                allow_never: true,
                permanent_requires_admin: false,
                principals_on_first_use: Some(false),
                max_tokens_per_principal: 7,
            }),
            resources: vec![
                resource("a.b-c", "/api/$it's/{id}", &[["list", "*", ""], ["get", "M-SEARCH", "/{path...}"]]),
                resource("root", "/", &[["see", "GET", ""]]),
            ],
            notices: Some(Notices { days_before: vec![7, 0], emails: name.to_owned(), ..Notices::default() }),
            suspended: true,
            etag: "e1".to_owned(),
            ..Workspace::default()
        }
    }

    #[test]
    fn what_was_written_is_read() {
        for name in [
            "Acme",
            "\"quoted\" \\ back\\nslash",
            "'''",
            "\"\"\"",
            "# no comment",
            "[policy]",
            "a = 1",
            "Zoë's café 日本 👩\u{200d}🔬",
            "\u{1b}[31m\u{202e}\n\t",
            " blanks ",
        ] {
            let before = workspace(name);
            let text = write(&before);
            assert!(text.lines().all(|line| !line.chars().any(is_steering)), "{text}");
            let sheet = read("acme.toml", &text).unwrap_or_else(|failure| panic!("{text}{failure:?}"));
            assert_eq!(sheet.workspace, settings(&before), "{text}");
            assert_eq!(sheet.paths.len(), 16);
        }
    }

    #[test]
    fn what_is_not_set_stays_as_it_is() {
        let bare = Workspace { policy: None, notices: None, resources: Vec::new(), ..workspace("Bare") };
        assert_eq!(read("bare.toml", &write(&bare)).expect("well formed").paths, ["display_name", "resources"]);
        let odd = Policy { default_ttl: Some(prost_types::Duration { seconds: 1, nanos: 500_000_000 }), ..Policy::default() };
        let text = write(&Workspace { policy: Some(odd), ..bare });
        assert!(text.contains("\n# default_ttl is left out: 1.5"), "{text}");
        let paths = read("odd.toml", &text).expect("well formed").paths;
        assert_eq!(paths, ["display_name", "policy.allow_never", "policy.permanent_requires_admin", "resources"]);
    }

    #[test]
    fn a_file_says_only_what_it_has() {
        let sheet = read("ttl.toml", "[policy]\nmax_temporary_ttl = \"8h\"").expect("well formed");
        assert_eq!(sheet.paths, ["policy.max_temporary_ttl"]);
        assert_eq!(sheet.workspace.policy.and_then(|policy| policy.max_temporary_ttl).map(|span| span.seconds), Some(28_800));
        assert_eq!(read("none.toml", "resources = []").expect("well formed").paths, ["resources"]);
    }

    #[test]
    fn mistakes_name_the_key_and_the_fix() {
        for (text, expected) in [
            ("prefix = \"x\"", "prefix: is not known here: take it out, or name one of display_name, policy, notices, resources"),
            ("display_name = 7", "display_name: must be a text in quotes"),
            ("display_name = \"  \"", "display_name: must have 1 to 100 characters"),
            ("policy = 1", "policy: must be a table"),
            ("[policy]\nttl = \"90d\"", "policy.ttl: is not known here"),
            ("[policy]\ndefault_ttl = 90", "policy.default_ttl: must be a span in quotes"),
            ("[policy]\ndefault_ttl = \"90\"", "policy.default_ttl: 90 is not a span of time"),
            ("[policy]\ndefault_ttl = \"0s\"", "policy.default_ttl: it must be at least 1s"),
            ("[policy]\nallow_never = \"true\"", "policy.allow_never: must be true or false, without quotes"),
            ("[policy]\nmax_tokens_per_principal = 0", "policy.max_tokens_per_principal: must be a number from 1 to 100000"),
            ("resources = \"x\"", "resources: must be tables: [[resources]]"),
            ("resources = [1]", "resources[0]: must be a table"),
            ("[[resources]]\nresource = \"a\"\nendpoint = \"/a\"", "resources[0].operations: is missing: add a line such as"),
            ("[[resources]]\nresource = \"keyward\"", "resources[0].resource: must be 1 to 63"),
            ("[[resources]]\nendpoint = \"api/\"", "resources[0].endpoint: must be a path"),
            ("[[resources]]\nmethods = 1", "resources[0].methods: is not known here"),
            ("[[resources]]\noperations = []", "resources[0].operations: must be a list of at least one"),
            ("[[resources]]\noperations = [\"list\"]", "resources[0].operations[0]: must be an operation, a method"),
            ("[[resources]]\noperations = [\"list GET\", \"list get\"]", "resources[0].operations[1]: must have a method"),
            ("[[resources]]\noperations = [\"* GET\"]", "resources[0].operations[0]: must begin with an operation"),
            ("[[resources]]\noperations = [\"list GET x\"]", "resources[0].operations[0]: must be a path"),
        ] {
            let failure = read("bad.toml", text).expect_err(text);
            let shown = printed(&failure);
            assert_eq!(failure.exit(), Exit::Usage);
            assert!(shown.starts_with("keyward: bad.toml cannot be loaded; nothing was changed:\n"), "{shown}");
            assert!(shown.contains(&format!("\n  {expected}")), "{expected} is not in\n{shown}");
        }
        let two = printed(&read("bad.toml", "a = 1\nb = 2").expect_err("two mistakes"));
        assert!(two.contains("\n  a: ") && two.contains("\n  b: "), "{two}");
    }

    #[test]
    fn what_is_no_toml_is_not_shown() {
        let token = "prod_0abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQR";
        for text in [token.to_owned(), format!("\n{token} = "), format!("{token} = {token}")] {
            let shown = printed(&read("root.txt", &text).expect_err("not TOML"));
            assert!(shown.starts_with("keyward: root.txt is not TOML: line ") && !shown.contains(token), "{shown}");
        }
        let unknown = printed(&read("root.txt", &format!("{token} = 1")).expect_err("unknown"));
        assert!(!unknown.contains(token), "{unknown}");
        assert!(printed(&read("empty.toml", "# nothing\n").expect_err("empty")).contains("has nothing to load"));
    }
}
