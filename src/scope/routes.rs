//! Which scope the method and path of an HTTP request need: a workspace's table of routes.
//!
//! Servers read one path in different ways, and which one is behind the gateway is not known here. So a path has a route only if a strict
//! reading of it and a loose one lead to the same entry; see `path`.
//!
//! Each place in a path has, for each literal, the set of routes that have it there. A path narrows the set of all routes place by
//! place: no backtracking, so no table and no path makes a question slow.
//!
//! Invariant: of the routes that fit a request, one is narrower than all others, and it is the answer
//! (tests `the_narrowest_route_answers`, `exactly_ambiguous_pairs_are_refused`).
//! Invariant: a lenient server that sees another path than the strict reading sees one with the same route
//! (tests `no_disguise_reaches_another_route`, `any_path_that_is_answered_is_read_alike`).
//! Invariant: a literal that a loose server would take a segment for is not passed by in favour of a variable
//! (test `no_spelling_slips_past_a_literal`).

mod path;
mod table;

use std::collections::HashMap;

use super::Scope;
use path::{Segment, read_path};
use table::{ANY, Draft, OPERATIONS_MAX, PATTERN_BYTES_MAX, Part, is_method, read_table, takes};

const WORDS: usize = OPERATIONS_MAX.div_ceil(64);

/// Something that is reached over HTTP, and what can be done with it. As it is stored and sent.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Resource {
    /// The first half of its scopes.
    pub resource: String,
    /// Where it is: a pattern such as `/api/agents` or `/`.
    pub endpoint: String,
    /// What can be done with it.
    pub operations: Vec<Operation>,
}

/// One way to use a resource. As it is stored and sent.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Operation {
    /// The second half of the scope.
    pub operation: String,
    /// The HTTP method, or `*`. `GET` stands for `HEAD` too, where no route of `HEAD` fits.
    pub method: String,
    /// What follows the endpoint: nothing, or a pattern such as `/{id}` or `/{file...}`.
    pub path: String,
}

/// A rule that a table breaks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mistake {
    /// Where in the table: `[2].operations[1].path`; empty: the table as a whole.
    pub field: String,
    /// What it must be, and how to mend it.
    pub rule: String,
}

/// A table that is ready to be asked. The default is empty: no path has a route.
#[derive(Clone, Debug, Default)]
pub struct Routes {
    /// The narrower before the wider.
    entries: Vec<Route>,
    /// The routes that take each method that is named, and `HEAD`.
    methods: HashMap<Box<str>, Set>,
    /// The routes that take every other method.
    any_method: Set,
    /// Places in a path, from its first segment to the one after the longest pattern.
    columns: Vec<Column>,
    /// Every place after these.
    beyond: Column,
}

impl Routes {
    /// Checks and compiles a table.
    ///
    /// # Errors
    /// Every mistake: of a field the first, of a clash the first earlier route; of a table that is too large, only that.
    pub fn compile(resources: &[Resource]) -> Result<Self, Vec<Mistake>> {
        read_table(resources).map(Self::of)
    }

    /// The scope that a request needs. `path` is what the gateway received, undecoded; from `?` on it is ignored.
    /// Nothing: no route, or a method or path that servers read in different ways.
    #[must_use]
    pub fn scope_of(&self, http_method: &str, path: &str) -> Option<&Scope> {
        // A server may take `get` for `GET`, for which another route may be meant.
        if !is_method(http_method) {
            return None;
        }
        let segments = read_path(path)?;
        // What fits strictly fits loosely. So the narrowest loose route is the narrowest strict one, if it is a strict one at all.
        let route = self.narrowest(http_method, &segments)?;
        route.fits_strictly(&segments).then_some(&route.scope)
    }

    /// Whether no path has a route.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Roughly its size in memory, in bytes.
    #[must_use]
    pub fn bytes(&self) -> usize {
        let sets = |sets: &HashMap<Box<str>, Set>| {
            sets.capacity() * size_of::<(Box<str>, Set)>() + sets.keys().map(|text| ALLOCATION_BYTES + text.len()).sum::<usize>()
        };
        let columns = self.columns.iter().map(|column| size_of::<Column>() + sets(&column.literals)).sum::<usize>();
        let texts = |route: &Route| 2 * ALLOCATION_BYTES + route.pattern.len() + route.scope.as_str().len();
        let routes = self.entries.iter().map(|route| size_of::<Route>() + texts(route)).sum::<usize>();
        size_of::<Self>() + sets(&self.methods) + columns + routes
    }

    fn of(mut drafts: Vec<Draft>) -> Self {
        // A literal sorts before `{x}`, which sorts before `{x...}`: where one pattern covers another, the covered one is first.
        drafts.sort_by(|one, other| (&one.parts, one.method_width()).cmp(&(&other.parts, other.method_width())));
        let taking = |method: &str| drafts.iter().enumerate().filter(|(_, draft)| takes(&draft.method, method)).map(|(at, _)| at).collect();
        let named = drafts.iter().map(|draft| draft.method.as_str()).filter(|method| *method != ANY).chain(["HEAD"]);
        let width = drafts.iter().map(|draft| draft.parts.len()).max().unwrap_or_default();
        Self {
            methods: named.map(|method| (method.into(), taking(method))).collect(),
            any_method: taking(ANY),
            columns: (0..=width).map(|at| Column::of(at, &drafts)).collect(),
            beyond: Column::of(width + 1, &drafts),
            entries: drafts.into_iter().map(|draft| draft.route).collect(),
        }
    }

    fn column(&self, at: usize) -> &Column {
        self.columns.get(at).unwrap_or(&self.beyond)
    }

    /// The route that the loose reading leads to.
    fn narrowest(&self, http_method: &str, segments: &[Segment]) -> Option<&Route> {
        let by_method = self.methods.get(http_method).unwrap_or(&self.any_method);
        let fitting = by_method.and(&self.column(segments.len()).ends);
        let Some((last, others)) = segments.split_last() else {
            return self.entries.get(fitting.first()?);
        };
        let fitting = others
            .iter()
            .take(self.columns.len())
            .enumerate()
            .fold(fitting, |fitting, (at, segment)| fitting.and(&self.column(at).taking(&segment.loose)));
        let column = self.column(others.len());
        let found = fitting.and(&column.taking(&last.loose)).first()?;
        // Rails and older Spring take `/users/export.json` for `/users/export`, which `/users/{id}` must not open.
        let is_extended = column.wild.contains(found) && column.has_stem(&last.loose, &fitting);
        if is_extended { None } else { self.entries.get(found) }
    }
}

/// What an allocation costs beside its content, roughly.
const ALLOCATION_BYTES: usize = 16;

/// An entry of the table.
#[derive(Clone, Debug)]
struct Route {
    scope: Scope,
    pattern: Box<str>,
}

impl Route {
    /// Whether the strict reading of a path fits, of which it is known that the loose one does.
    fn fits_strictly(&self, segments: &[Segment]) -> bool {
        let literals = self.pattern.split('/').skip(1);
        literals.zip(segments).all(|(literal, segment)| literal.starts_with('{') || (segment.is_normal && literal == segment.decoded))
    }
}

/// A set of routes, each by its index.
#[derive(Clone, Copy, Debug, Default)]
struct Set([u64; WORDS]);

impl Set {
    fn insert(&mut self, index: usize) {
        if let Some(word) = self.0.get_mut(index / 64) {
            *word |= 1 << (index % 64);
        }
    }

    fn contains(&self, index: usize) -> bool {
        self.0.get(index / 64).is_some_and(|word| word >> (index % 64) & 1 == 1)
    }

    fn and(&self, other: &Self) -> Self {
        let mut both = *self;
        both.0.iter_mut().zip(other.0).for_each(|(word, other)| *word &= other);
        both
    }

    fn or(&self, other: &Self) -> Self {
        let mut either = *self;
        either.0.iter_mut().zip(other.0).for_each(|(word, other)| *word |= other);
        either
    }

    fn first(&self) -> Option<usize> {
        self.0.iter().zip((0..).step_by(64)).find(|(word, _)| **word != 0).map(|(word, start)| start + word.trailing_zeros() as usize)
    }
}

impl FromIterator<usize> for Set {
    fn from_iter<I: IntoIterator<Item = usize>>(indexes: I) -> Self {
        let mut set = Self::default();
        indexes.into_iter().for_each(|index| set.insert(index));
        set
    }
}

/// What the routes want at one place in a path.
#[derive(Clone, Debug, Default)]
struct Column {
    /// By folded literal: the routes that want it here.
    literals: HashMap<Box<str>, Set>,
    /// The routes that take any segment here.
    wild: Set,
    /// The routes that take a path that ended just before.
    ends: Set,
}

impl Column {
    fn of(at: usize, drafts: &[Draft]) -> Self {
        let mut column = Self::default();
        for (index, draft) in drafts.iter().enumerate() {
            let is_open = draft.parts.last() == Some(&Part::Rest);
            match draft.parts.get(at) {
                Some(Part::Literal(folded)) => column.literals.entry(folded.as_str().into()).or_default().insert(index),
                Some(Part::One | Part::Rest) => column.wild.insert(index),
                None if is_open => column.wild.insert(index),
                None => {}
            }
            if draft.parts.len() == at || (is_open && draft.parts.len() < at) {
                column.ends.insert(index);
            }
        }
        column
    }

    fn taking(&self, folded: &str) -> Set {
        self.literals.get(folded).map_or(self.wild, |literal| literal.or(&self.wild))
    }

    /// Whether one of the fitting routes wants what is left of a segment without its extension.
    fn has_stem(&self, folded: &str, fitting: &Set) -> bool {
        let dots = folded.match_indices('.').map(|(at, _)| at).take_while(|at| *at <= PATTERN_BYTES_MAX);
        let mut literals = dots.filter_map(|at| self.literals.get(folded.get(..at)?));
        literals.any(|literal| literal.and(fitting).first().is_some())
    }
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeSet, sync::LazyLock};

    use proptest::{collection::vec, prelude::*};

    use super::*;

    type Entry = (&'static str, String);

    /// One resource, whose operations are named by their index.
    fn table(entries: &[Entry]) -> Vec<Resource> {
        let operation = |(at, (method, path)): (usize, &Entry)| Operation {
            operation: format!("o{at}"),
            method: (*method).to_owned(),
            path: if path == "/" { String::new() } else { path.clone() },
        };
        vec![Resource { resource: "r".into(), endpoint: "/".into(), operations: entries.iter().enumerate().map(operation).collect() }]
    }

    fn entries(text: &'static str) -> Vec<Entry> {
        text.split(", ").map(|entry| entry.split_once(' ').expect(entry)).map(|(method, path)| (method, path.to_owned())).collect()
    }

    fn routes(text: &'static str) -> Routes {
        Routes::compile(&table(&entries(text))).expect(text)
    }

    /// The index of the operation that answers.
    fn answer(routes: &Routes, method: &str, path: &str) -> Option<usize> {
        routes.scope_of(method, path).map(|scope| scope.as_str()["r:o".len()..].parse().expect("an index"))
    }

    /// Asks for paths, each with the index that must answer, or `-`.
    fn expect(routes: &Routes, questions: &str) {
        for question in questions.split(", ") {
            let [method, path, index] = question.split(' ').collect::<Vec<_>>().try_into().expect(question);
            assert_eq!(answer(routes, method, path), index.parse().ok(), "{question}");
        }
    }

    #[test]
    fn the_narrowest_of_several_routes_answers() {
        let routes = routes("GET /a/{x}, GET /a/b, * /{x...}, HEAD /a/b, GET /, POST /a/{x}, GET /Team/{x}/Log");
        expect(
            &routes,
            "GET /a/b 1, GET /a/c 0, HEAD /a/b 3, HEAD /a/c 0, PUT /a/b 2, POST /a/b 5, GET / 4, HEAD / 4, PUT / -, M-X /z/y 2",
        );
        expect(&routes, "GET /a/c?x=/a/b 0, GET /a/b/ -, GET /a 2, GET /Team/Z/Log 6, GET /team/Z/Log -, get /a/b -, * /a/c -, G3T /a/b -");
        expect(&Routes::default(), "GET / -, GET /a -");
        assert!(Routes::default().is_empty() && !routes.is_empty() && routes.bytes() > Routes::default().bytes());
    }

    #[test]
    fn an_endpoint_and_a_path_make_a_pattern() {
        let resource = |endpoint: &str, paths: &[&str]| Resource {
            resource: format!("r{}", endpoint.len()),
            endpoint: endpoint.into(),
            operations: paths.iter().map(|path| Operation { operation: "o".into(), method: "GET".into(), path: (*path).into() }).collect(),
        };
        let table = [resource("/", &["", "/x"]), resource("/a", &["", "/{y}/{z...}"]), resource("/ab/{x...}", &[""])];
        let routes = Routes::compile(&table).expect("a table");
        for (path, scope) in [("/", "r1:o"), ("/x", "r1:o"), ("/a", "r2:o"), ("/a/b/c/d", "r2:o"), ("/ab/c/d", "r10:o")] {
            assert_eq!(routes.scope_of("GET", path).map(Scope::as_str), Some(scope), "{path}");
        }
        assert!(routes.scope_of("GET", "/a/b").is_none() && routes.scope_of("GET", "/ab").is_none());
    }

    #[test]
    fn no_spelling_slips_past_a_literal() {
        let routes = routes("GET /api/{x}, GET /api/admin, GET /api/a:b, GET /api/v1.x, GET /api/sik/{x}, POST /api/{x}/y, GET /api/v1");
        expect(
            &routes,
            "GET /api/admin 1, GET /api/%61dmin 1, GET /%61pi/admin 1, GET /api/a:b 2, GET /api/v1.x 3, GET /api/v1 6, GET /api/v1.y -, GET /api/Adam 0",
        );
        expect(&routes, "GET /api/ADMIN -, GET /API/admin -, GET /API/x -, GET /api/%41dmin -, GET /api/admin. -, GET /api/admin.%20 -");
        expect(&routes, "GET /api/admin%C2%A0 -, GET /api/%20admin -, GET /api/a%3Ab -, GET /api/adm%C4%B1n -, GET /api/adm%C4%B0n -");
        expect(&routes, "GET /api/admin.json -, GET /api/admin.tar.gz -, GET /api/v1.x.json -, GET /api/adam.json 0, GET /api/.admin 0");
        expect(
            &routes,
            "GET /api/Sik/z -, GET /api/%C5%BFi%E2%84%AA/z -, GET /api/sik/z 4, POST /api/admin.json/y 5, GET /api/Jos%C3%A9 0",
        );
    }

    /// Patterns over a small alphabet, so that they meet often.
    fn entry() -> impl Strategy<Value = Entry> {
        let part = prop::sample::select(vec!["a", "b", "B", "{x}", "{y}"]);
        let method = prop::sample::select(vec!["GET", "GET", "HEAD", "POST", "*"]);
        (method, vec(part, 0..4), prop::bool::weighted(0.2)).prop_map(|(method, mut parts, is_open)| {
            parts.extend(is_open.then_some("{z...}"));
            (method, format!("/{}", parts.join("/")))
        })
    }

    /// As many of these as make a table.
    fn accepted(candidates: Vec<Entry>) -> Vec<Entry> {
        candidates.into_iter().fold(Vec::new(), |mut kept, entry| {
            kept.push(entry);
            if Routes::compile(&table(&kept)).is_err() {
                kept.pop();
            }
            kept
        })
    }

    fn fits(entry: &Entry, method: &str, path: &[&str]) -> bool {
        let parts: Vec<&str> = entry.1.split('/').filter(|part| !part.is_empty()).collect();
        let is_open = entry.1.ends_with("...}");
        ([method, "*"].contains(&entry.0) || entry.0 == "GET" && method == "HEAD")
            && (parts.len() == path.len() || is_open && parts.len() < path.len())
            && parts.iter().zip(path).all(|(part, segment)| part.starts_with('{') || part.eq_ignore_ascii_case(segment))
    }

    /// Every request that tells such patterns apart.
    static REQUESTS: LazyLock<Vec<(&str, Vec<&str>)>> = LazyLock::new(|| {
        let mut paths = vec![Vec::new()];
        for start in 0..40 {
            paths.extend(["a", "b", "z"].map(|segment| [&paths[start][..], &[segment]].concat()));
        }
        paths.into_iter().flat_map(|path| ["GET", "HEAD", "POST", "PUT"].map(|method| (method, path.clone()))).collect()
    });

    fn reach(entry: &Entry) -> BTreeSet<usize> {
        REQUESTS.iter().enumerate().filter(|(_, (method, path))| fits(entry, method, path)).map(|(at, _)| at).collect()
    }

    /// A table in the naive way.
    struct Reference {
        entries: Vec<Entry>,
        reaches: Vec<BTreeSet<usize>>,
        routes: Routes,
    }

    impl Reference {
        fn of(candidates: Vec<Entry>) -> Self {
            let entries = accepted(candidates);
            let routes = Routes::compile(&table(&entries)).expect("a table");
            Self { reaches: entries.iter().map(reach).collect(), entries, routes }
        }

        /// The index of the entry with the smallest reach that fits.
        fn answer(&self, method: &str, path: &[&str]) -> Option<usize> {
            (0..self.entries.len()).filter(|at| fits(&self.entries[*at], method, path)).min_by_key(|at| self.reaches[*at].len())
        }

        /// Whoever reads a path that has a route, however leniently, finds that route.
        fn is_read_alike(&self, method: &str, path: &str) -> bool {
            let Some(found) = answer(&self.routes, method, path) else { return true };
            (1..4).all(|decodings| {
                let seen = lenient(path, decodings);
                let mut seen: Vec<&str> = seen.iter().map(String::as_str).collect();
                let is_alike = self.answer(method, &seen) == Some(found);
                let stem = seen.pop().and_then(|last| last.rsplit_once('.')).map(|(stem, _)| stem).filter(|stem| !stem.is_empty());
                seen.extend(stem);
                let is_literal = !self.entries[found].1.ends_with('}');
                is_alike && (is_literal || stem.is_none() || self.answer(method, &seen) == Some(found))
            })
        }
    }

    /// What a server sees that decodes so often, and then merges, strips and folds whatever some server does.
    fn lenient(path: &str, decodings: usize) -> Vec<String> {
        let mut text = path.split('?').next().unwrap_or_default().to_owned();
        for _ in 0..decodings {
            let mut pieces = text.split('%');
            let first = pieces.next().unwrap_or_default().to_owned();
            text = pieces.fold(first, |done, piece| match piece.get(..2).and_then(|digits| u8::from_str_radix(digits, 16).ok()) {
                Some(byte) => format!("{done}{}{}", char::from(byte), &piece[2..]),
                None => format!("{done}%{piece}"),
            });
        }
        let text = text.replace('\\', "/");
        text.split(['?', '#']).next().unwrap_or_default().split('/').fold(Vec::new(), |mut seen, segment| {
            let segment = segment.split(';').next().unwrap_or_default();
            let cut = segment.trim().trim_end_matches(['.', ' ', '\0']);
            match segment {
                ".." => drop(seen.pop()),
                _ if cut.is_empty() => {}
                _ => seen.push(cut.to_lowercase()),
            }
            seen
        })
    }

    /// So that nearly every path would have a route.
    const CATCH_ALL: [(&str, &str); 2] = [("*", "/{z...}"), ("*", "/")];

    const DISGUISES: [&str; 19] =
        ["%20", "%2f", "%5C", "%00", "%2e", "%252e", "./", "x/../", "/", "//", ";x=1", ".", "\\", "%3b", "?", "%3F", "%c0%af", "#", ".x"];

    /// The path with one character changed or something put before it.
    fn disguise(path: &str, at: usize, kind: usize) -> String {
        let (start, end) = path.split_at(at % (path.len() + 1));
        let Some(byte) = end.bytes().next().filter(|_| kind < 5) else {
            return format!("{start}{}{end}", DISGUISES[kind % DISGUISES.len()]);
        };
        let flipped = if byte.is_ascii_lowercase() { byte.to_ascii_uppercase() } else { byte.to_ascii_lowercase() };
        let changed = match kind {
            0 => format!("%{byte:02x}"),
            1 => format!("%{byte:02X}"),
            2 => format!("%25{byte:02x}"),
            3 => format!("%{flipped:02x}"),
            _ => char::from(flipped).to_string(),
        };
        [start, &changed, &end[1..]].concat()
    }

    proptest! {
        #[test]
        fn exactly_ambiguous_pairs_are_refused(one in entry(), other in entry()) {
            let (reach_one, reach_other) = (reach(&one), reach(&other));
            let nested = reach_one.is_subset(&reach_other) != reach_other.is_subset(&reach_one);
            let is_clear = nested || reach_one.is_disjoint(&reach_other);
            prop_assert_eq!(Routes::compile(&table(&[one, other])).is_ok(), is_clear);
        }

        #[test]
        fn the_narrowest_route_answers(candidates in vec(entry(), 1..16)) {
            let mut reference = Reference::of(candidates);
            reference.entries.iter_mut().for_each(|entry| entry.1.make_ascii_lowercase());
            let routes = Routes::compile(&table(&reference.entries)).expect("a table");
            for (request, (method, path)) in REQUESTS.iter().enumerate() {
                let found = answer(&routes, method, &format!("/{}", path.join("/")));
                prop_assert_eq!(found, reference.answer(method, path));
                let mut fitting = reference.reaches.iter().filter(|reach| reach.contains(&request));
                prop_assert!(found.is_none_or(|found| fitting.all(|wide| reference.reaches[found].is_subset(wide))));
            }
        }

        #[test]
        fn no_disguise_reaches_another_route(
            candidates in vec(entry(), 1..12), path in "(/[abz]){1,4}", method in "GET|HEAD|POST|PUT", (before, kind) in (0_usize..40, 0_usize..60)
        ) {
            let reference = Reference::of([candidates, CATCH_ALL.map(|(method, path)| (method, path.to_owned())).into()].concat());
            let start = if kind < 24 { disguise(&path, before, kind) } else { path };
            for at in 0..=start.len() {
                for kind in 0..24 {
                    let path = disguise(&start, at, kind);
                    prop_assert!(reference.is_read_alike(&method, &path), "{} {:?}", path, reference.entries);
                }
            }
        }

        #[test]
        fn any_path_that_is_answered_is_read_alike(
            candidates in vec(entry(), 1..12), paths in vec("/([abAz]|%[0-9a-fA-F]{2}|%252[ef]|[/.;%?# ~-]){0,8}", 40)
        ) {
            let reference = Reference::of([candidates, CATCH_ALL.map(|(method, path)| (method, path.to_owned())).into()].concat());
            for path in paths {
                prop_assert!(reference.is_read_alike("GET", &path), "{} {:?}", path, reference.entries);
            }
        }

        #[test]
        fn nothing_panics(names in vec((".*", ".*", "/[a{}.]*|.*", "/.*"), 0..4), method in "[A-Z]*|.*", path in "/(.|%[0-9a-f]{2})*|.*") {
            let operation = |(operation, method, _, path): &(String, String, String, String)| Operation {
                operation: operation.clone(), method: method.clone(), path: path.clone()
            };
            let table: Vec<_> = names.iter().map(|name| Resource {
                resource: name.0.clone(), endpoint: name.2.clone(), operations: names.iter().map(operation).collect()
            }).collect();
            let _ = Routes::compile(&table).map(|routes| routes.scope_of(&method, &path).cloned());
            let _ = routes("* /{x...}, GET /a/{x}, GET /").scope_of(&method, &path);
        }
    }
}
