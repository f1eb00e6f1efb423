//! The resources in a settings file: what is reached where, and which scope it needs.

use std::fmt::Write as _;

use toml::{Table, Value};

use super::{Reader, quoted};
use crate::{
    proto::{Operation, Resource},
    scope::Scope,
};

const KEYS: [&str; 3] = ["resource", "endpoint", "operations"];
const METHOD_CHARS_MAX: usize = 32;

impl Reader {
    pub(super) fn resources(&mut self, values: &[Value]) {
        for (index, value) in values.iter().enumerate() {
            let path = format!("resources[{index}]");
            match value.as_table() {
                Some(table) => self.resource(&path, table),
                None => self.mistakes.add(path, "must be a table with resource, endpoint and operations"),
            }
        }
        self.sheet.paths.push("resources".to_owned());
    }

    fn resource(&mut self, path: &str, table: &Table) {
        self.known(&format!("{path}."), table, &KEYS);
        let mut required = |key, example: &str| {
            let value = table.get(key);
            if value.is_none() {
                self.mistakes.add(format!("{path}.{key}"), format!("is missing: add a line such as {key} = {example}"));
            }
            value
        };
        let resource = required("resource", "\"agents\"");
        let endpoint = required("endpoint", "\"/api/agents\"");
        let operations = required("operations", "[\"list GET\", \"update PATCH /{id}\"]");
        let resource = resource.and_then(|value| self.checked(&format!("{path}.resource"), value, is_resource));
        let endpoint = endpoint.and_then(|value| self.checked(&format!("{path}.endpoint"), value, is_path));
        let operations = operations.and_then(|value| self.operations(&format!("{path}.operations"), value));
        if let (Some(resource), Some(endpoint), Some(operations)) = (resource, endpoint, operations) {
            self.sheet.workspace.resources.push(Resource { resource, endpoint, operations });
        }
    }

    fn operations(&mut self, field: &str, value: &Value) -> Option<Vec<Operation>> {
        let Some(values) = value.as_array().filter(|values| !values.is_empty()) else {
            self.mistakes.add(field, "must be a list of at least one, such as [\"list GET\", \"update PATCH /{id}\"]");
            return None;
        };
        let mut operations = Vec::new();
        for (index, value) in values.iter().enumerate() {
            let field = format!("{field}[{index}]");
            let text = self.text(&field, value);
            operations.extend(text.and_then(|text| self.mistakes.take(&field, operation(&text))));
        }
        Some(operations)
    }
}

fn is_resource(text: &str) -> Result<(), &'static str> {
    let scope = format!("{text}:x").parse::<Scope>();
    if scope.is_ok_and(|scope| !scope.is_reserved()) {
        Ok(())
    } else {
        Err("must be 1 to 63 of a-z 0-9 - . beginning with a letter, and not keyward")
    }
}

fn is_path(text: &str) -> Result<(), &'static str> {
    let is_whole = text.starts_with('/') && !text.ends_with('/') && !text.contains("//") && !text.contains(char::is_whitespace);
    if is_whole || text == "/" { Ok(()) } else { Err("must be a path such as /api/agents/{id}, with neither doubled nor trailing slashes") }
}

/// `list GET` or `update PATCH /{id}`.
fn operation(text: &str) -> Result<Operation, &'static str> {
    let mut words = text.split_whitespace();
    let (Some(operation), Some(method), path, None) = (words.next(), words.next(), words.next(), words.next()) else {
        return Err("must be an operation, a method and, if it has one, a path, such as \"list GET\" or \"update PATCH /{id}\"");
    };
    let scope = format!("x:{operation}").parse::<Scope>();
    if !scope.is_ok_and(|scope| !scope.is_wildcard()) {
        return Err("must begin with an operation: 1 to 63 of a-z 0-9 - . beginning with a letter");
    }
    if !is_method(method) {
        return Err("must have a method in capital letters, such as GET, or * for any, as its second word");
    }
    path.map(is_path).transpose()?;
    Ok(Operation { operation: operation.to_owned(), method: method.to_owned(), path: path.unwrap_or_default().to_owned() })
}

fn is_method(text: &str) -> bool {
    let is_name = text.bytes().all(|byte| byte.is_ascii_uppercase() || byte == b'-');
    text == "*" || (is_name && text.len() <= METHOD_CHARS_MAX)
}

// Writing to a String cannot fail.
pub(super) fn write(resource: &Resource, text: &mut String) {
    let Resource { resource, endpoint, operations } = resource;
    let _ = writeln!(text, "\n[[resources]]\nresource = {}\nendpoint = {}\noperations = [", quoted(resource), quoted(endpoint));
    for Operation { operation, method, path } in operations {
        let _ = writeln!(text, "    {},", quoted(format!("{operation} {method} {path}").trim_end()));
    }
    text.push_str("]\n");
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::cli::sheet::{EXAMPLE, read, write};

    /// The segments of a route; what stands for any one segment is `{}`, for the rest `{...}`.
    fn segments(path: &str) -> Vec<&str> {
        let shape = |segment: &str| match (segment.starts_with('{'), segment.ends_with("...}")) {
            (true, true) => Some("{...}"),
            (true, false) => Some("{}"),
            (false, _) => None,
        };
        path.split('/').skip(1).map(|segment| shape(segment).unwrap_or(segment)).collect()
    }

    /// Whether some path fits both, and neither is the more exact one.
    fn are_rivals(one: &[&str], other: &[&str]) -> bool {
        let rank = |segment: &str| if segment == "{...}" { 2 } else { u8::from(segment == "{}") };
        let mut leads = BTreeSet::new();
        for (one, other) in one.iter().zip(other) {
            if rank(one) + rank(other) == 0 && one != other {
                return false;
            }
            leads.insert(rank(one).cmp(&rank(other)));
            if rank(one).max(rank(other)) == 2 {
                break;
            }
        }
        let reaches = |path: &[&str]| path.last() == Some(&"{...}");
        let meet = one.len() == other.len() || (reaches(one) && one.len() < other.len()) || (reaches(other) && other.len() < one.len());
        leads.remove(&std::cmp::Ordering::Equal);
        meet && leads.len() != 1
    }

    #[test]
    fn the_example_is_a_table_of_routes_without_rivals() {
        let sheet = read("agent-platform.toml", EXAMPLE).expect("well formed");
        assert_eq!(sheet.paths.len(), 12, "{:?}", sheet.paths);
        let mut scopes = Vec::new();
        let mut routes: Vec<(&str, String)> = Vec::new();
        for Resource { resource, endpoint, operations } in &sheet.workspace.resources {
            for Operation { operation, method, path } in operations {
                scopes.push(format!("{resource}:{operation}"));
                routes.push((method, format!("{endpoint}{path}")));
            }
        }
        let expected = "agents:list agents:install agents:update agents:delete executions:list webhooks:send integrations:list \
                        integrations:create integrations:update integrations:delete knowledge-base:list knowledge-base:search \
                        triggers:list triggers:execute triggers:details assistant-chat:chat assistant-chat:history storage:upload \
                        storage:download storage:delete storage:list";
        assert_eq!(scopes.join(" "), expected);
        for (index, (method, path)) in routes.iter().enumerate() {
            let rival = routes[..index].iter().find(|(of, other)| of == method && are_rivals(&segments(path), &segments(other)));
            assert_eq!(rival, None, "{method} {path}");
        }
        assert!(are_rivals(&["a", "{}"], &["{}", "b"]) && are_rivals(&["{}"], &["{}"]) && !are_rivals(&["a"], &["{}"]));
        assert_eq!(read("again.toml", &write(&sheet.workspace)).expect("well formed").workspace, sheet.workspace);
    }
}
