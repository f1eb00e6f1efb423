//! The rules of a table of routes, and which routes clash.
//!
//! Two routes clash if some request fits both and neither fits only requests that the other fits too, as in Go's `net/http` since 1.22.
//!
//! Invariant: whatever the table, it is compiled or refused with every mistake named
//! (tests `a_table_keeps_to_its_rules`, `a_table_is_bounded`).
//! Invariant: letter case alone never tells two routes apart, so the loose reading of a path has one answer
//! (test `a_clash_names_both_entries`).

use super::{Mistake, Operation, Resource, Route, path::fold};
use crate::scope::{RESERVED, Scope, is_part};

const RESOURCES_MAX: usize = 100;
const RESOURCE_OPERATIONS_MAX: usize = 200;
pub(super) const OPERATIONS_MAX: usize = 1_000;
pub(super) const PATTERN_BYTES_MAX: usize = 512;
const SEGMENTS_MAX: usize = 32;
const METHOD_CHARS_MAX: usize = 32;
const NAME_CHARS_MAX: usize = 32;
const PART_RULE: &str = "must be 1 to 63 of `a-z 0-9 - .`, beginning with a letter";

/// Any method.
pub(super) const ANY: &str = "*";

/// What a pattern wants of a segment. The order is that from the narrowest.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Part {
    /// This, folded.
    Literal(String),
    /// Any one.
    One,
    /// Any one, and all that follow.
    Rest,
}

impl Part {
    fn read(text: &str) -> Result<Self, &'static str> {
        let variable = text.strip_prefix('{').and_then(|text| text.strip_suffix('}'));
        match variable.map(|name| (name.strip_suffix("..."), name)) {
            Some((Some(name), _)) if is_name(name) => Ok(Self::Rest),
            Some((None, name)) if is_name(name) => Ok(Self::One),
            Some(_) => Err("must have a name of 1 to 32 of `a-z 0-9 _`, beginning with a letter, as in `{id}` or `{file...}`"),
            None if text.is_empty() => Err("must not be empty: take out doubled and trailing slashes"),
            None if !text.bytes().all(is_literal) => {
                Err("must be `{name}`, `{name...}`, or made of letters, digits and `- . _ ~ ! $ & ' ( ) * + , = : @`")
            }
            None if text.ends_with('.') => Err("must not end with a dot, which some servers cut off"),
            None => Ok(Self::Literal(fold(text))),
        }
    }
}

fn is_name(text: &str) -> bool {
    (1..=NAME_CHARS_MAX).contains(&text.len())
        && text.starts_with(|char: char| char.is_ascii_lowercase())
        && text.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'_')
}

fn is_literal(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"-._~!$&'()*+,=:@".contains(&byte)
}

pub(super) fn is_method(text: &str) -> bool {
    (1..=METHOD_CHARS_MAX).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_uppercase() || byte == b'-')
}

/// The parts of an endpoint, or of what follows one.
fn read_pattern(text: &str) -> Result<Vec<Part>, String> {
    if text.len() > PATTERN_BYTES_MAX {
        return Err(format!("must have at most {PATTERN_BYTES_MAX} bytes; shorten it"));
    }
    let segments = text.strip_prefix('/').ok_or("must begin with `/`; put one in front")?;
    let part = |(at, segment)| Part::read(segment).map_err(|rule| format!("segment {at} {rule}"));
    let parts: Vec<Part> = (1..).zip(segments.split('/')).map(part).collect::<Result<_, _>>()?;
    match parts.split_last() {
        Some((_, others)) if others.contains(&Part::Rest) => {
            Err("must have `{name...}` at the end only; use `{name}` before it".to_owned())
        }
        _ if parts.len() > SEGMENTS_MAX => Err(format!("must have at most {SEGMENTS_MAX} segments; end it with `{{name...}}` earlier")),
        _ => Ok(parts),
    }
}

/// An entry that is well formed.
pub(super) struct Draft {
    /// Where it is in the table.
    place: String,
    pub(super) route: Route,
    pub(super) method: String,
    pub(super) parts: Vec<Part>,
}

impl Draft {
    pub(super) fn method_width(&self) -> usize {
        ["GET", ANY].iter().position(|wide| *wide == self.method).map_or(0, |at| at + 1)
    }

    /// Whether some request fits both, and neither is the narrower one.
    fn clashes(&self, other: &Self) -> bool {
        let methods_meet = takes(&self.method, &other.method) || takes(&other.method, &self.method);
        methods_meet && meet(&self.parts, &other.parts) && self.covers(other) == other.covers(self)
    }

    /// Whether every request that fits the other one fits this one.
    fn covers(&self, other: &Self) -> bool {
        takes(&self.method, &other.method) && covers(&self.parts, &other.parts)
    }

    fn clash(&self, earlier: &Self) -> Mistake {
        let name = |draft: &Self| format!("`{} {}`", draft.method, draft.route.pattern);
        let (this, that) = (name(self), name(earlier));
        let rule = if self.covers(earlier) {
            format!(
                "must not be a duplicate: {this} fits the same requests as {that} of {}, also if letter case differs; remove one",
                earlier.place
            )
        } else {
            format!(
                "must not share requests with {}, as neither {this} nor {that} is the narrower one by method and path together; make one narrower in \
                 both, or let no request fit both",
                earlier.place
            )
        };
        Mistake { field: self.place.clone(), rule }
    }
}

/// Whether a route with the first method takes (all of) the second.
pub(super) fn takes(route: &str, method: &str) -> bool {
    route == ANY || route == method || (route == "GET" && method == "HEAD")
}

/// Whether some path fits both patterns.
fn meet(one: &[Part], other: &[Part]) -> bool {
    let goes_on_to = |short: &[Part], long: &[Part]| short.last() == Some(&Part::Rest) && short.len() < long.len();
    let lengths_meet = one.len() == other.len() || goes_on_to(one, other) || goes_on_to(other, one);
    // From the end, where the routes of a table differ sooner.
    lengths_meet && one.iter().zip(other).rev().all(|pair| !matches!(pair, (Part::Literal(one), Part::Literal(other)) if one != other))
}

/// Whether every path that fits the second pattern fits the first.
fn covers(wide: &[Part], narrow: &[Part]) -> bool {
    for pair in wide.iter().zip(narrow) {
        match pair {
            (Part::Rest, _) => return true,
            (Part::One, Part::One | Part::Literal(_)) => {}
            (wide, narrow) if wide == narrow => {}
            _ => return false,
        }
    }
    wide.len() == narrow.len()
}

/// The entries of a table.
///
/// # Errors
/// Every mistake; of a table that is too large, only that.
pub(super) fn read_table(resources: &[Resource]) -> Result<Vec<Draft>, Vec<Mistake>> {
    let mut reader = Reader { mistakes: too_large(resources), drafts: Vec::new() };
    if reader.mistakes.is_empty() {
        reader.read(resources);
        reader.find_clashes();
    }
    if reader.mistakes.is_empty() { Ok(reader.drafts) } else { Err(reader.mistakes) }
}

fn too_large(resources: &[Resource]) -> Vec<Mistake> {
    let mistake = |field, rule| Mistake { field, rule };
    if resources.len() > RESOURCES_MAX {
        return vec![mistake(String::new(), format!("must have at most {RESOURCES_MAX} resources; merge or remove some"))];
    }
    let large = resources.iter().enumerate().filter(|(_, resource)| resource.operations.len() > RESOURCE_OPERATIONS_MAX);
    let rule = format!("must have at most {RESOURCE_OPERATIONS_MAX} entries; split the resource, or use `*` and `{{name...}}`");
    let mut mistakes: Vec<_> = large.map(|(at, _)| mistake(format!("[{at}].operations"), rule.clone())).collect();
    if resources.iter().map(|resource| resource.operations.len()).sum::<usize>() > OPERATIONS_MAX {
        mistakes.push(mistake(String::new(), format!("must have at most {OPERATIONS_MAX} operations in all; use `*` and `{{name...}}`")));
    }
    mistakes
}

/// Reads a table, and notes each mistake.
struct Reader {
    mistakes: Vec<Mistake>,
    drafts: Vec<Draft>,
}

impl Reader {
    fn demand(&mut self, is_kept: bool, field: String, rule: &str) {
        if !is_kept {
            self.mistakes.push(Mistake { field, rule: rule.to_owned() });
        }
    }

    fn read(&mut self, resources: &[Resource]) {
        for (at, resource) in resources.iter().enumerate() {
            self.read_name(at, &resource.resource, resources);
            let is_used = !resource.operations.is_empty();
            self.demand(is_used, format!("[{at}].operations"), "must have at least one entry; add one or remove the resource");
            let endpoint = if resource.endpoint == "/" { Ok(Vec::new()) } else { read_pattern(&resource.endpoint) };
            self.demand(endpoint.is_ok(), format!("[{at}].endpoint"), endpoint.as_ref().err().map_or("", String::as_str));
            for (index, operation) in resource.operations.iter().enumerate() {
                self.read_operation(format!("[{at}].operations[{index}]"), resource, endpoint.as_deref().ok(), operation);
            }
        }
    }

    fn read_name(&mut self, at: usize, name: &str, resources: &[Resource]) {
        let field = format!("[{at}].resource");
        self.demand(is_part(name), field.clone(), PART_RULE);
        let is_free = name != RESERVED;
        self.demand(is_free, field.clone(), "must not be `keyward`, which stands for Keyward itself; choose another");
        if let Some(earlier) = resources.iter().take(at).position(|earlier| earlier.resource == name) {
            self.demand(false, field, &format!("must be named once; it is [{earlier}] already: merge them, or rename one"));
        }
    }

    fn read_operation(&mut self, place: String, resource: &Resource, endpoint: Option<&[Part]>, operation: &Operation) {
        self.demand(is_part(&operation.operation), format!("{place}.operation"), PART_RULE);
        let has_method = operation.method == ANY || is_method(&operation.method);
        self.demand(has_method, format!("{place}.method"), "must be `*`, or 1 to 32 capital letters and `-`");
        let path = if operation.path.is_empty() { Ok(Vec::new()) } else { read_pattern(&operation.path) };
        match path.and_then(|path| joined(endpoint.unwrap_or_default(), &path)) {
            Err(rule) => self.demand(false, format!("{place}.path"), &rule),
            Ok(parts) if has_method && endpoint.is_some() => {
                let scope = Scope(format!("{}:{}", resource.resource, operation.operation).into());
                let root = if operation.path.is_empty() { "/" } else { "" };
                let start = if resource.endpoint == "/" { root } else { &resource.endpoint };
                let route = Route { scope, pattern: [start, &operation.path].concat().into() };
                self.drafts.push(Draft { place, route, method: operation.method.clone(), parts });
            }
            Ok(_) => {}
        }
    }

    /// Names each route that clashes with an earlier one, with the first such.
    fn find_clashes(&mut self) {
        for (at, draft) in self.drafts.iter().enumerate() {
            let earlier = self.drafts.iter().take(at).find(|earlier| earlier.clashes(draft));
            self.mistakes.extend(earlier.map(|earlier| draft.clash(earlier)));
        }
    }
}

/// The whole pattern.
fn joined(endpoint: &[Part], path: &[Part]) -> Result<Vec<Part>, String> {
    if endpoint.last() == Some(&Part::Rest) && !path.is_empty() {
        return Err("must be empty after an endpoint that ends with `{name...}`; move what is common to the endpoint".to_owned());
    }
    if endpoint.len() + path.len() > SEGMENTS_MAX {
        return Err(format!("must have at most {SEGMENTS_MAX} segments together with the endpoint; end it with `{{name...}}` earlier"));
    }
    Ok([endpoint, path].concat())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scope::routes::Routes;

    fn good() -> Resource {
        let operation = Operation { operation: "o".into(), method: "GET".into(), path: "/a".into() };
        Resource { resource: "r".into(), endpoint: "/".into(), operations: vec![operation] }
    }

    fn mistakes(table: &[Resource]) -> Vec<Mistake> {
        Routes::compile(table).err().unwrap_or_default()
    }

    fn fields(table: &[Resource]) -> Vec<String> {
        mistakes(table).into_iter().map(|mistake| mistake.field).collect()
    }

    #[test]
    fn a_table_keeps_to_its_rules() {
        let good = good();
        let refusal = |mend: &dyn Fn(&mut Resource)| {
            let mut resource = good.clone();
            mend(&mut resource);
            fields(&[resource])
        };
        for name in ["", "A", "a:b", "*", "keyward", "é"] {
            assert_eq!(refusal(&|resource| resource.resource = name.into()), ["[0].resource"], "{name}");
        }
        for name in ["", "A", "*", "a b"] {
            assert_eq!(refusal(&|resource| resource.operations[0].operation = name.into()), ["[0].operations[0].operation"], "{name}");
        }
        for method in ["", "get", "**", "G3", "G T", &"A".repeat(33)] {
            assert_eq!(refusal(&|resource| resource.operations[0].method = method.into()), ["[0].operations[0].method"], "{method}");
        }
        let (long, deep) = (format!("/{}", "a".repeat(512)), "/a".repeat(33));
        let bad =
            "a //a /a/ /a//b /. /a/.. /a. /a%41 /a;b /a?b /a#b /a\\b /é /{} /{A} /{1} /{a..} /{...} /{a /a} /x{a} /{a}x /{a...}/b /{a.b}";
        for path in bad.split(' ').chain([long.as_str(), deep.as_str(), "/a b", "/"]) {
            assert_eq!(refusal(&|resource| resource.operations[0].path = path.into()), ["[0].operations[0].path"], "{path}");
            assert_eq!(refusal(&|resource| resource.endpoint = path.into()).is_empty(), path == "/", "{path}");
        }
        assert_eq!(refusal(&|resource| resource.endpoint = String::new()), ["[0].endpoint"]);
        assert_eq!(refusal(&|resource| resource.endpoint = "/{x...}".into()), ["[0].operations[0].path"]);
        assert_eq!(refusal(&|resource| resource.endpoint = "/a".repeat(32)), ["[0].operations[0].path"]);
        assert_eq!(refusal(&|resource| resource.operations.clear()), ["[0].operations"]);
        assert!(refusal(&|resource| resource.operations[0].path = "/a-._~!$&'()*+,=:@Z9/{a_1}/{b...}".into()).is_empty());
        assert_eq!(fields(&[good.clone(), good.clone()]), ["[1].resource", "[1].operations[0]"]);
        let broken = Resource { endpoint: "a".into(), operations: vec![Operation::default()], ..Resource::default() };
        let all = ["[1].resource", "[1].endpoint", "[1].operations[0].operation", "[1].operations[0].method"];
        assert_eq!(fields(&[good.clone(), broken]), all);
    }

    #[test]
    fn a_table_is_bounded() {
        let part = |at: usize, count: usize| Resource {
            resource: format!("r{at}"),
            endpoint: format!("/{at}"),
            operations: (0..count)
                .map(|path| Operation { operation: "o".into(), method: "GET".into(), path: format!("/{path}") })
                .collect(),
        };
        let refusal = |sizes: &[usize]| {
            let table: Vec<_> = sizes.iter().enumerate().map(|(at, count)| part(at, *count)).collect();
            fields(&table)
        };
        assert!(refusal(&[200; 5]).is_empty() && refusal(&[1; 100]).is_empty() && refusal(&[]).is_empty());
        assert_eq!(refusal(&[200, 200, 200, 200, 200, 1]), [""]);
        assert_eq!(refusal(&[1; 101]), [""]);
        assert_eq!(refusal(&[1, 201]), ["[1].operations"]);
    }

    #[test]
    fn a_clash_names_both_entries() {
        let rule = |one: [&str; 2], other: [&str; 2]| {
            let mut table = [good()];
            table[0].operations =
                [one, other].map(|[method, path]| Operation { operation: "o".into(), method: method.into(), path: path.into() }).into();
            mistakes(&table).pop().map_or(String::new(), |mistake| mistake.rule)
        };
        for (one, other) in [("GET /a/{x}", "GET /{x}/b"), ("HEAD /{x}", "GET /a"), ("* /a", "GET /{x...}"), ("GET /A", "GET /a")] {
            let [first, second] = [one, other].map(|entry| entry.split_once(' ').expect(entry).into());
            let rule = rule(first, second);
            for part in [one, other, "[0].operations[0]"] {
                assert!(rule.contains(part), "{rule}");
            }
        }
        assert!(rule(["GET", "/A"], ["GET", "/a"]).contains("duplicate"));
        assert_eq!(rule(["GET", "/a/{x}"], ["GET", "/a/{x}/{y...}"]) + &rule(["GET", "/{x}"], ["HEAD", "/a"]), "");
    }
}
