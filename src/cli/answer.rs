//! How each answer of Keyward looks, to people and to programs.

mod audit;
mod notices;
mod principals;
mod replicas;
mod workspaces;

use std::fmt::Write as _;

use prost::Message;
use prost_reflect::{DescriptorPool, DynamicMessage, MessageDescriptor, SerializeOptions};

pub(super) use self::notices::{fault_rows, notice_rows};
use super::{
    expiry,
    failure::{Failure, disarm},
    table::{Column, Details, table},
};
use crate::proto::{
    self, ActivateTokenResponse, CreateMyTokenResponse, CreateTokenResponse, DeactivateTokenResponse, DeletePrincipalResponse,
    DeleteTokenResponse, DeleteWorkspaceResponse, EndSessionResponse, GetTokenResponse, IssueTemporaryTokenResponse, ListMyTokensResponse,
    ListTokensResponse, Propagation, RegenerateSelfResponse, RegenerateTokenResponse, ReportLeakedTokensResponse,
    RevokePrincipalTokensResponse, RevokeSelfResponse, RevokeTokenResponse, Token, TokenKind, TokenState, UpdateTokenResponse,
    ValidateTokenResponse, Verdict, WhoAmIResponse,
};

/// A message that a command shows.
pub(super) trait Answer: Message {
    /// The name of the message in the proto files.
    const NAME: &'static str;
    /// What people are told that the secret is, before it is shown.
    const SECRET_IS: &'static str = "This is the token itself";
    /// What people are told if the secret could not be written.
    const SECRET_LOST: &'static str = "the token's secret could not be written and is lost: run `keyward token regenerate` for a new one";

    /// For people.
    fn text(&self) -> String;

    /// What must be shown alone, and this once.
    fn secret(&self) -> Option<&str> {
        None
    }

    /// How far the change has got.
    fn propagation(&self) -> Option<&Propagation> {
        None
    }
}

/// For programs: proto3 JSON. Fields that are empty are there too, so that a script finds them.
///
/// # Errors
/// `output` if the message does not fit the compiled proto files.
pub(super) fn json<A: Answer>(answer: &A) -> Result<String, Failure> {
    let build = || {
        let mut bytes = Vec::new();
        serialize(&descriptor(A::NAME)?, answer, &mut serde_json::Serializer::pretty(&mut bytes))?;
        Ok(bytes)
    };
    Ok(finish(build())? + "\n")
}

/// For programs: messages of one kind, each as proto3 JSON on a line of its own.
///
/// # Errors
/// As `json`.
pub(super) fn json_lines<M: Message>(name: &str, messages: &[M]) -> Result<String, Failure> {
    let build = || {
        let (descriptor, mut lines) = (descriptor(name)?, Vec::new());
        for message in messages {
            serialize(&descriptor, message, &mut serde_json::Serializer::new(&mut lines))?;
            lines.push(b'\n');
        }
        Ok(lines)
    };
    finish(build())
}

type Built<T> = Result<T, Box<dyn std::error::Error>>;

fn descriptor(name: &str) -> Built<MessageDescriptor> {
    let pool = DescriptorPool::decode(proto::DESCRIPTORS)?;
    Ok(pool.get_message_by_name(&format!("keyward.v1.{name}")).ok_or("unknown message")?)
}

fn serialize<M: Message, F: serde_json::ser::Formatter>(
    descriptor: &MessageDescriptor,
    message: &M,
    serializer: &mut serde_json::Serializer<&mut Vec<u8>, F>,
) -> Built<()> {
    let message = DynamicMessage::decode(descriptor.clone(), message.encode_to_vec().as_slice())?;
    message.serialize_with_options(serializer, &SerializeOptions::new().skip_default_fields(false))?;
    Ok(())
}

fn finish(built: Built<Vec<u8>>) -> Result<String, Failure> {
    let bytes = built.map_err(|error| Failure::output(format!("the answer has no form in JSON: {error}")))?;
    Ok(disarm(&String::from_utf8_lossy(&bytes)))
}

/// Answers that show one thing, some with a new secret, some with the reach of the change.
macro_rules! shows {
    ($field:ident by $details:path: $($message:ident $(, $part:ident)*;)+) => {
        $(impl Answer for $message {
            const NAME: &'static str = stringify!($message);

            fn text(&self) -> String {
                self.$field.as_ref().map($details).unwrap_or_default()
            }

            $(shows!(@ $part);)*
        })+
    };
    (@ secret) => {
        fn secret(&self) -> Option<&str> {
            Some(&self.secret)
        }
    };
    (@ propagation) => {
        fn propagation(&self) -> Option<&Propagation> {
            self.propagation.as_ref()
        }
    };
}
use shows;

shows! {
    token by details:
    GetTokenResponse;
    UpdateTokenResponse, propagation;
    ActivateTokenResponse, propagation;
    DeactivateTokenResponse, propagation;
    RevokeTokenResponse, propagation;
    RevokeSelfResponse, propagation;
    CreateTokenResponse, secret, propagation;
    CreateMyTokenResponse, secret, propagation;
    IssueTemporaryTokenResponse, secret, propagation;
    RegenerateTokenResponse, secret, propagation;
    RegenerateSelfResponse, secret, propagation;
}

/// Answers after which something is gone.
macro_rules! is_gone {
    ($($message:ident)+) => {
        $(impl Answer for $message {
            const NAME: &'static str = stringify!($message);

            fn text(&self) -> String {
                "deleted\n".to_owned()
            }

            fn propagation(&self) -> Option<&Propagation> {
                self.propagation.as_ref()
            }
        })+
    };
}

is_gone!(DeleteTokenResponse DeleteWorkspaceResponse);

/// Answers that say how many tokens were revoked.
macro_rules! counts_revoked {
    ($($message:ident)+) => {
        $(impl Answer for $message {
            const NAME: &'static str = stringify!($message);

            fn text(&self) -> String {
                Details::default().add("revoked", self.revoked_count.to_string()).text()
            }

            fn propagation(&self) -> Option<&Propagation> {
                self.propagation.as_ref()
            }
        })+
    };
}

counts_revoked!(RevokePrincipalTokensResponse EndSessionResponse DeletePrincipalResponse);

/// Whatever was reported, the answer is the same.
impl Answer for ReportLeakedTokensResponse {
    const NAME: &'static str = "ReportLeakedTokensResponse";

    fn text(&self) -> String {
        "reported\n".to_owned()
    }
}

impl Answer for ListTokensResponse {
    const NAME: &'static str = "ListTokensResponse";

    fn text(&self) -> String {
        rows(&self.tokens)
    }
}

impl Answer for ListMyTokensResponse {
    const NAME: &'static str = "ListMyTokensResponse";

    fn text(&self) -> String {
        rows(&self.tokens)
    }
}

impl Answer for WhoAmIResponse {
    const NAME: &'static str = "WhoAmIResponse";

    fn text(&self) -> String {
        let mut details = Details::default();
        details.add("principal", &self.principal).add("workspace", &self.workspace).add("scopes", listed(&self.scopes, "none"));
        if let Some(token) = &self.token {
            details.add("token", &token.id).add("name", &token.display_name).add("prefix", &token.hint);
            details.add("expires", instant(token.expire_time.as_ref()));
        }
        details.text()
    }
}

impl Answer for ValidateTokenResponse {
    const NAME: &'static str = "ValidateTokenResponse";

    fn text(&self) -> String {
        let mut details = Details::default();
        details.add("verdict", self.verdict().as_str_name().trim_start_matches("VERDICT_"));
        if !self.missing_scopes.is_empty() {
            details.add("missing scopes", listed(&self.missing_scopes, ""));
        }
        details.add_if("route's scope", &self.derived_scope);
        if self.token_id.is_empty() {
            return details.text();
        }
        details.add("token", &self.token_id).add("name", &self.display_name).add("kind", kind(self.kind()));
        details.add("workspace", &self.workspace).add("principal", &self.principal);
        details.add("scopes", listed(&self.scopes, "none")).add("audiences", listed(&self.audiences, "any"));
        details.add_if("metadata", &metadata(&self.metadata)).add("expires", instant(self.expire_time.as_ref()));
        details.text()
    }
}

impl ValidateTokenResponse {
    /// Both must say so: a verdict that this version does not know is a no.
    pub(super) fn is_good(&self) -> bool {
        self.valid && self.verdict() == Verdict::Valid
    }
}

const COLUMNS: [Column; 10] = [
    Column { title: "ID", width_max: 26, right: false },
    Column { title: "NAME", width_max: 32, right: false },
    Column { title: "PREFIX", width_max: 8, right: false },
    Column { title: "PRINCIPAL", width_max: 24, right: false },
    Column { title: "CREATED BY", width_max: 24, right: false },
    Column { title: "CREATED", width_max: 17, right: false },
    Column { title: "EXPIRES", width_max: 17, right: false },
    Column { title: "LAST USED", width_max: 17, right: false },
    Column { title: "USES", width_max: 20, right: true },
    Column { title: "STATUS", width_max: 11, right: false },
];

fn rows(tokens: &[Token]) -> String {
    if tokens.is_empty() {
        return String::new();
    }
    let rows: Vec<Vec<String>> = tokens.iter().map(row).collect();
    table(&COLUMNS, &rows)
}

fn row(token: &Token) -> Vec<String> {
    vec![
        token.id.clone(),
        token.display_name.clone(),
        token.hint.clone(),
        token.principal.clone(),
        token.created_by.clone(),
        minutes(token.create_time.as_ref()),
        minutes(token.expire_time.as_ref()),
        minutes(token.last_used_time.as_ref()),
        token.use_count.to_string(),
        state(token.state()).to_owned(),
    ]
}

fn details(token: &Token) -> String {
    let mut details = Details::default();
    details.add("id", &token.id).add("name", &token.display_name).add("prefix", &token.hint).add("status", state(token.state()));
    details.add("kind", kind(token.kind())).add("workspace", &token.workspace).add("principal", &token.principal);
    details.add("scopes", listed(&token.scopes, "none")).add("audiences", listed(&token.audiences, "any"));
    details.add("addresses", listed(&token.allowed_cidrs, "any"));
    details.add_if("metadata", &metadata(&token.metadata)).add_if("session", &token.session_id);
    details.add("created", instant(token.create_time.as_ref())).add("created by", &token.created_by);
    details.add("changed", instant(token.update_time.as_ref())).add("expires", instant(token.expire_time.as_ref()));
    details.add("last used", instant(token.last_used_time.as_ref())).add_if("last address", &token.last_used_ip);
    details.add("uses", token.use_count.to_string());
    if token.revoke_time.is_some() {
        details.add("revoked", instant(token.revoke_time.as_ref())).add_if("reason", &token.revoke_reason);
    }
    details.add("etag", &token.etag).text()
}

fn instant(instant: Option<&prost_types::Timestamp>) -> String {
    shown(instant, expiry::seconds)
}

fn minutes(instant: Option<&prost_types::Timestamp>) -> String {
    shown(instant, expiry::minutes)
}

fn shown(instant: Option<&prost_types::Timestamp>, show: fn(jiff::Timestamp) -> String) -> String {
    instant.map_or_else(|| "Never".to_owned(), |instant| expiry::from_wire(instant).map_or_else(|| "beyond the calendar".to_owned(), show))
}

fn listed(values: &[String], empty: &str) -> String {
    if values.is_empty() { empty.to_owned() } else { values.join(", ") }
}

fn metadata(metadata: &std::collections::BTreeMap<String, String>) -> String {
    metadata.iter().fold(String::new(), |mut text, (key, value)| {
        // Writing to a String cannot fail.
        let _ = write!(text, "{}{key}={value}", if text.is_empty() { "" } else { ", " });
        text
    })
}

fn state(state: TokenState) -> &'static str {
    match state {
        TokenState::Unspecified => "Unknown",
        TokenState::Active => "Active",
        TokenState::Inactive => "Inactive",
        TokenState::Expired => "Expired",
        TokenState::Revoked => "Revoked",
    }
}

fn kind(kind: TokenKind) -> &'static str {
    match kind {
        TokenKind::Unspecified => "unknown",
        TokenKind::Permanent => "permanent",
        TokenKind::Temporary => "temporary",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proto::{
        CreateWorkspaceResponse, GetPrincipalResponse, GetWorkspaceResponse, ListAuditEventsResponse, ListPrincipalsResponse,
        ListWorkspacesResponse, ResumePrincipalResponse, ResumeWorkspaceResponse, SuspendPrincipalResponse, SuspendWorkspaceResponse,
        UpdateWorkspaceResponse, UpsertPrincipalResponse,
    };

    fn token() -> Token {
        Token {
            id: "tok_0000000000000000000001".to_owned(),
            display_name: "ci \u{1b}[31m".to_owned(),
            principal: "ann".to_owned(),
            created_by: "root".to_owned(),
            hint: "prod_abc".to_owned(),
            state: TokenState::Active.into(),
            kind: TokenKind::Permanent.into(),
            create_time: Some(prost_types::Timestamp { seconds: 1_000_000_000, nanos: 0 }),
            metadata: [("team".to_owned(), "core".to_owned())].into(),
            use_count: 12,
            ..Token::default()
        }
    }

    #[test]
    fn a_list_shows_what_people_recognise_a_token_by() {
        let text = ListTokensResponse { tokens: vec![token()], next_page_token: String::new() }.text();
        let (titles, row) = text.split_once('\n').expect("two lines");
        let titles: Vec<&str> = titles.split("  ").map(str::trim).filter(|title| !title.is_empty()).collect();
        assert_eq!(titles, COLUMNS.map(|column| column.title));
        let values: Vec<&str> = row.split("  ").map(str::trim).filter(|value| !value.is_empty()).collect();
        let expected = [
            "tok_0000000000000000000001",
            "ci \\u{1b}[31m",
            "prod_abc",
            "ann",
            "root",
            "2001-09-09T01:46Z",
            "Never",
            "Never",
            "12",
            "Active",
        ];
        assert_eq!(values, expected);
        assert_eq!(ListMyTokensResponse::default().text(), "");
    }

    #[test]
    fn json_has_the_names_of_proto3() {
        let answer = CreateTokenResponse { token: Some(token()), secret: "prod_secret".to_owned(), propagation: None };
        let text = json(&answer).expect("JSON");
        let object: serde_json::Value = serde_json::from_str(&text).expect("JSON");
        assert_eq!(object["secret"], "prod_secret");
        assert_eq!(object["token"]["displayName"], "ci \u{1b}[31m");
        assert_eq!(object["token"]["state"], "TOKEN_STATE_ACTIVE");
        assert_eq!(object["token"]["createTime"], "2001-09-09T01:46:40Z");
        assert_eq!(object["token"]["useCount"], "12");
        assert!(object["token"].get("expireTime").is_none());
        let empty: serde_json::Value = serde_json::from_str(&json(&ListTokensResponse::default()).expect("JSON")).expect("JSON");
        assert_eq!(empty["tokens"], serde_json::json!([]));
    }

    #[test]
    fn every_answer_is_in_the_proto_files() {
        fn check<A: Answer + Default>() {
            json(&A::default()).unwrap_or_else(|failure| panic!("{}: {failure:?}", A::NAME));
        }
        check::<GetTokenResponse>();
        check::<UpdateTokenResponse>();
        check::<ActivateTokenResponse>();
        check::<DeactivateTokenResponse>();
        check::<RevokeTokenResponse>();
        check::<RevokeSelfResponse>();
        check::<RegenerateTokenResponse>();
        check::<RegenerateSelfResponse>();
        check::<ListMyTokensResponse>();
        check::<DeleteTokenResponse>();
        check::<RevokePrincipalTokensResponse>();
        check::<WhoAmIResponse>();
        check::<ValidateTokenResponse>();
        check::<CreateMyTokenResponse>();
        check::<IssueTemporaryTokenResponse>();
        check::<EndSessionResponse>();
        check::<ReportLeakedTokensResponse>();
        check::<CreateWorkspaceResponse>();
        check::<GetWorkspaceResponse>();
        check::<ListWorkspacesResponse>();
        check::<UpdateWorkspaceResponse>();
        check::<SuspendWorkspaceResponse>();
        check::<ResumeWorkspaceResponse>();
        check::<DeleteWorkspaceResponse>();
        check::<UpsertPrincipalResponse>();
        check::<GetPrincipalResponse>();
        check::<ListPrincipalsResponse>();
        check::<SuspendPrincipalResponse>();
        check::<ResumePrincipalResponse>();
        check::<DeletePrincipalResponse>();
        check::<ListAuditEventsResponse>();
    }

    #[test]
    fn details_of_a_token() {
        let text = details(&token());
        assert!(text.starts_with("id:         tok_0000000000000000000001\nname:       ci \\u{1b}[31m\n"), "{text}");
        assert!(text.contains("\nexpires:    Never\n") && text.contains("\nmetadata:   team=core\n"), "{text}");
        assert!(!text.contains("revoked") && !text.contains("session"), "{text}");
    }

    #[test]
    fn a_verdict_that_is_not_known_is_a_no() {
        let answer = |valid, verdict| ValidateTokenResponse { valid, verdict, ..Default::default() };
        assert!(answer(true, Verdict::Valid.into()).is_good());
        assert!(!answer(true, 99).is_good() && !answer(false, Verdict::Valid.into()).is_good() && !answer(true, 0).is_good());
        assert_eq!(answer(false, Verdict::Unknown.into()).text(), "verdict: UNKNOWN\n");
        assert_eq!(answer(false, 99).text(), "verdict: UNSPECIFIED\n");
    }
}
