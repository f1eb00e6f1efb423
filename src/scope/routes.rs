//! Which scope the method and path of an HTTP request need.

use super::Scope;

/// Something that is reached over HTTP, and what can be done with it.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Resource {
    /// The first half of its scopes.
    pub resource: String,
    /// Where it is.
    pub endpoint: String,
    /// What can be done with it.
    pub operations: Vec<Operation>,
}

/// One way to use a resource.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Operation {
    /// The second half of the scope.
    pub operation: String,
    /// The HTTP method, or `*`.
    pub method: String,
    /// What follows the endpoint.
    pub path: String,
}

/// A rule that an entry of a table breaks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mistake {
    /// Where in the table: `[2].operations[1].path`.
    pub field: String,
    /// What it must be.
    pub rule: String,
}

/// A table that is ready to be asked.
#[derive(Debug, Default)]
pub struct Routes {
    scopes: Vec<Scope>,
}

impl Routes {
    /// Checks and compiles.
    ///
    /// # Errors
    /// Every mistake.
    pub fn compile(_resources: &[Resource]) -> Result<Self, Vec<Mistake>> {
        Ok(Self::default())
    }

    /// The scope that a request needs.
    #[must_use]
    pub fn scope_of(&self, _http_method: &str, _path: &str) -> Option<&Scope> {
        self.scopes.first()
    }

    /// Whether no path has a route.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.scopes.is_empty()
    }

    /// Roughly its size in memory.
    #[must_use]
    pub fn bytes(&self) -> usize {
        0
    }
}
