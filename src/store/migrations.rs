//! The versions of the schema. A version that was released is never edited; the next one is added below it.
//!
//! Invariant: migrations expand before they contract, so that the version before can work beside this one (test
//! `a_program_works_beside_a_newer_schema`).
//!
//! The same statements serve both databases; `{text}` and `{bytes}` stand for the types that differ. Text sorts by its bytes on both.
//! Instants are microseconds since 1970 (UTC); an `expire_time` of 9223372036854775807 is "never".

use sea_orm::{ConnectionTrait as _, DbBackend, DbErr};
use sea_orm_migration::{MigrationName, MigrationTrait, MigratorTrait, SchemaManager, async_trait::async_trait};

pub(super) struct Migrator;

#[async_trait]
impl MigratorTrait for Migrator {
    fn migrations() -> Vec<Box<dyn MigrationTrait>> {
        vec![
            Box::new(Version { name: "0001_ground_floor", up: GROUND_FLOOR }),
            Box::new(Version { name: "0002_whole_domain", up: WHOLE_DOMAIN }),
            Box::new(Version { name: "0003_notices", up: NOTICES }),
            Box::new(Version { name: "0004_several_servers", up: SEVERAL_SERVERS }),
        ]
    }
}

/// One version: its name, and the statements that lead to it.
struct Version {
    name: &'static str,
    up: &'static str,
}

impl MigrationName for Version {
    fn name(&self) -> &str {
        self.name
    }
}

#[async_trait]
impl MigrationTrait for Version {
    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        let (text, bytes) = match manager.get_database_backend() {
            DbBackend::Postgres => ("TEXT COLLATE \"C\"", "BYTEA"),
            _ => ("TEXT", "BLOB"),
        };
        let statements = self.up.replace("{text}", text).replace("{bytes}", bytes);
        manager.get_connection().execute_unprepared(&statements).await.map(drop)
    }

    fn use_transaction(&self) -> Option<bool> {
        Some(true)
    }
}

const GROUND_FLOOR: &str = r"
CREATE TABLE workspace (
    id {text} PRIMARY KEY,
    display_name {text} NOT NULL,
    prefix {text} NOT NULL UNIQUE,
    suspended BOOLEAN NOT NULL,
    create_time BIGINT NOT NULL,
    update_time BIGINT NOT NULL,
    version BIGINT NOT NULL
);

CREATE TABLE principal (
    workspace {text} NOT NULL,
    id {text} NOT NULL,
    kind SMALLINT NOT NULL,
    display_name {text} NOT NULL,
    suspended BOOLEAN NOT NULL,
    create_time BIGINT NOT NULL,
    update_time BIGINT NOT NULL,
    version BIGINT NOT NULL,
    PRIMARY KEY (workspace, id)
);

CREATE TABLE token (
    id {text} PRIMARY KEY,
    workspace {text} NOT NULL,
    digest {bytes} NOT NULL UNIQUE,
    -- The secret before the last regeneration, good until its time.
    previous_digest {bytes},
    previous_expire_time BIGINT,
    display_name {text} NOT NULL,
    principal {text} NOT NULL,
    kind SMALLINT NOT NULL,
    state SMALLINT NOT NULL,
    hint {text} NOT NULL,
    scopes {text} NOT NULL,
    audiences {text} NOT NULL,
    allowed_cidrs {text} NOT NULL,
    metadata {text} NOT NULL,
    session_id {text} NOT NULL,
    created_by {text} NOT NULL,
    create_time BIGINT NOT NULL,
    update_time BIGINT NOT NULL,
    expire_time BIGINT NOT NULL,
    revoke_time BIGINT,
    revoke_reason {text} NOT NULL,
    delete_time BIGINT,
    version BIGINT NOT NULL
);
CREATE UNIQUE INDEX token_by_previous_digest ON token (previous_digest) WHERE previous_digest IS NOT NULL;
CREATE INDEX token_by_create_time ON token (workspace, kind, create_time, id) WHERE delete_time IS NULL;
CREATE INDEX token_by_display_name ON token (workspace, kind, display_name, id) WHERE delete_time IS NULL;
CREATE INDEX token_by_expire_time ON token (workspace, kind, expire_time, id) WHERE delete_time IS NULL;
CREATE INDEX token_by_principal ON token (workspace, principal, create_time, id) WHERE delete_time IS NULL;
CREATE INDEX token_by_created_by ON token (workspace, created_by, create_time, id) WHERE delete_time IS NULL;
CREATE INDEX token_by_state ON token (workspace, kind, state, create_time, id) WHERE delete_time IS NULL;

-- A token's audiences once more, to list the tokens of a product.
CREATE TABLE token_audience (
    workspace {text} NOT NULL,
    audience {text} NOT NULL,
    token_id {text} NOT NULL,
    PRIMARY KEY (workspace, audience, token_id)
);
CREATE INDEX token_audience_by_token ON token_audience (token_id);

-- Apart from the token and without an index on what counts, so that counting a use rewrites little.
CREATE TABLE token_usage (
    token_id {text} PRIMARY KEY,
    use_count BIGINT NOT NULL,
    last_used_time BIGINT NOT NULL,
    last_used_ip {text} NOT NULL
);

-- Every change of a token takes the next number from here; the row lock makes the order of numbers the order of commits.
CREATE TABLE change_head (
    id SMALLINT PRIMARY KEY CHECK (id = 1),
    seq BIGINT NOT NULL,
    epoch BIGINT NOT NULL
);
INSERT INTO change_head (id, seq, epoch) VALUES (1, 0, 1);

-- What the change with that number touched: kind 1, the token with this digest.
CREATE TABLE change_log (
    seq BIGINT NOT NULL,
    item BIGINT NOT NULL,
    kind SMALLINT NOT NULL,
    subject {bytes} NOT NULL,
    change_time BIGINT NOT NULL,
    PRIMARY KEY (seq, item)
);
CREATE INDEX change_log_by_time ON change_log (change_time);

-- One row for each start of a server.
CREATE TABLE replica (
    incarnation {text} PRIMARY KEY,
    address {text} NOT NULL,
    version {text} NOT NULL,
    lease_ms BIGINT NOT NULL,
    acked_seq BIGINT NOT NULL,
    renewal BIGINT NOT NULL,
    evicted BOOLEAN NOT NULL
);

CREATE TABLE audit_event (
    id {text} PRIMARY KEY,
    workspace {text} NOT NULL,
    event_time BIGINT NOT NULL,
    method {text} NOT NULL,
    actor_workspace {text} NOT NULL,
    actor_principal {text} NOT NULL,
    actor_token_id {text},
    actor_address {text} NOT NULL,
    token_id {text},
    principal {text} NOT NULL,
    reason {text} NOT NULL,
    before {text},
    after {text}
);
CREATE INDEX audit_event_by_time ON audit_event (workspace, event_time, id);
CREATE INDEX audit_event_by_token ON audit_event (token_id, event_time, id);

-- Answers kept for a repeated request_id, sealed with the keyring.
CREATE TABLE replay (
    id {bytes} PRIMARY KEY,
    request {bytes} NOT NULL,
    answer {bytes} NOT NULL,
    expire_time BIGINT NOT NULL
);
CREATE INDEX replay_by_expire_time ON replay (expire_time);

-- Which keys this store's tokens were made with.
CREATE TABLE keyring (
    kid {text} PRIMARY KEY,
    fingerprint {bytes} NOT NULL
);
";

const WHOLE_DOMAIN: &str = r"
ALTER TABLE workspace ADD COLUMN default_ttl_seconds BIGINT NOT NULL DEFAULT 7776000;
ALTER TABLE workspace ADD COLUMN max_permanent_ttl_seconds BIGINT NOT NULL DEFAULT 31536000;
ALTER TABLE workspace ADD COLUMN max_temporary_ttl_seconds BIGINT NOT NULL DEFAULT 86400;
ALTER TABLE workspace ADD COLUMN allow_never BOOLEAN NOT NULL DEFAULT FALSE;
ALTER TABLE workspace ADD COLUMN permanent_requires_admin BOOLEAN NOT NULL DEFAULT FALSE;
ALTER TABLE workspace ADD COLUMN principals_on_first_use BOOLEAN NOT NULL DEFAULT TRUE;
ALTER TABLE workspace ADD COLUMN max_tokens_per_principal BIGINT NOT NULL DEFAULT 100;
ALTER TABLE workspace ADD COLUMN resources {text} NOT NULL DEFAULT '[]';
ALTER TABLE workspace ADD COLUMN delete_time BIGINT;
-- Whether the tokens and principals of a deleted one are gone.
ALTER TABLE workspace ADD COLUMN emptied BOOLEAN NOT NULL DEFAULT FALSE;
CREATE INDEX workspace_by_delete_time ON workspace (emptied, delete_time) WHERE delete_time IS NOT NULL;

-- Every prefix that a workspace has or had: tokens out there carry it, and nobody else gets it.
CREATE TABLE prefix (
    prefix {text} PRIMARY KEY,
    workspace {text} NOT NULL
);
CREATE INDEX prefix_by_workspace ON prefix (workspace);
INSERT INTO prefix (prefix, workspace) SELECT prefix, id FROM workspace;

ALTER TABLE principal ADD COLUMN email {text} NOT NULL DEFAULT '';
ALTER TABLE principal ADD COLUMN role SMALLINT NOT NULL DEFAULT 1;

-- With the name at its end, a text is looked for in names without a look at each token.
DROP INDEX token_by_create_time;
CREATE INDEX token_by_create_time ON token (workspace, kind, create_time, id, display_name) WHERE delete_time IS NULL;

ALTER TABLE token ADD COLUMN is_root BOOLEAN NOT NULL DEFAULT FALSE;
-- A workspace had one prefix until now.
ALTER TABLE token ADD COLUMN prefix {text} NOT NULL DEFAULT '';
UPDATE token SET prefix = (SELECT w.prefix FROM workspace w WHERE w.id = token.workspace);
UPDATE token SET is_root = TRUE WHERE ' ' || scopes || ' ' LIKE '% keyward:root %';
CREATE INDEX token_by_root ON token (id) WHERE is_root;
CREATE INDEX token_by_live_principal ON token (workspace, principal, kind, expire_time) WHERE delete_time IS NULL AND state <> 3;
CREATE INDEX token_by_session ON token (workspace, session_id) WHERE session_id <> '' AND delete_time IS NULL AND state <> 3;
-- What is old enough to be removed. The sum keeps lists away from an index that leads through every workspace.
CREATE INDEX token_by_end ON token ((expire_time + 0)) WHERE expire_time < 9223372036854775807;
CREATE INDEX token_by_revoke_time ON token (revoke_time) WHERE revoke_time IS NOT NULL;
CREATE INDEX token_by_delete_time ON token (delete_time) WHERE delete_time IS NOT NULL;

-- OK, or the gRPC code with which a call was refused.
ALTER TABLE audit_event ADD COLUMN code {text} NOT NULL DEFAULT 'OK';
CREATE INDEX audit_event_by_principal ON audit_event (workspace, principal, event_time, id);
CREATE INDEX audit_event_by_actor ON audit_event (workspace, actor_principal, event_time, id);
CREATE INDEX audit_event_by_method ON audit_event (workspace, method, event_time, id);
";

const NOTICES: &str = r"
-- What is told of its tokens, as JSON; empty: nothing.
ALTER TABLE workspace ADD COLUMN notices {text} NOT NULL DEFAULT '';
ALTER TABLE workspace ADD COLUMN raise_faults BOOLEAN NOT NULL DEFAULT FALSE;
CREATE INDEX workspace_by_notices ON workspace (id) WHERE notices <> '' AND delete_time IS NULL;

-- With the state at its end, the tokens that are near their end are found without a look at each of them.
DROP INDEX token_by_expire_time;
CREATE INDEX token_by_expire_time ON token (workspace, kind, expire_time, id, state) WHERE delete_time IS NULL;

-- The nearest step that was told of a token with this end. Whoever writes it tells it.
CREATE TABLE notice_mark (
    token_id {text} PRIMARY KEY,
    expire_time BIGINT NOT NULL,
    days_before INTEGER NOT NULL,
    -- On which ways that step was told: 1 to the addresses, 2 to the owner, 4 to the webhook.
    told INTEGER NOT NULL
);

-- It is true as long as the token lives and has this end, and shown as long as the workspace wants faults.
CREATE TABLE fault (
    id {text} PRIMARY KEY,
    workspace {text} NOT NULL,
    token_id {text} NOT NULL,
    days_before INTEGER NOT NULL,
    expire_time BIGINT NOT NULL,
    raise_time BIGINT NOT NULL,
    acknowledge_time BIGINT,
    acknowledged_by {text} NOT NULL DEFAULT ''
);
CREATE INDEX fault_by_workspace ON fault (workspace, id);
CREATE UNIQUE INDEX fault_by_token ON fault (token_id, expire_time, days_before);

-- Mails and calls that are not delivered. Channel 1: mail, 2: webhook.
CREATE TABLE notice (
    id {text} PRIMARY KEY,
    workspace {text} NOT NULL,
    channel SMALLINT NOT NULL,
    event {text} NOT NULL,
    recipient {text} NOT NULL,
    to_owner BOOLEAN NOT NULL,
    token_ids {text} NOT NULL,
    token_count BIGINT NOT NULL,
    actor {text} NOT NULL,
    reason {text} NOT NULL,
    create_time BIGINT NOT NULL,
    dead BOOLEAN NOT NULL,
    attempts BIGINT NOT NULL,
    -- When it is tried next. Whoever takes it up moves this ahead for as long as the attempt may take, and puts a text of their own into claim.
    due_time BIGINT NOT NULL,
    claim {text} NOT NULL,
    give_up_time BIGINT NOT NULL,
    last_error {text} NOT NULL,
    -- Long, and therefore the last.
    items {text} NOT NULL
);
CREATE INDEX notice_by_due_time ON notice (channel, workspace, due_time) WHERE NOT dead;
CREATE INDEX notice_by_create_time ON notice (create_time, id, channel) WHERE dead;
CREATE INDEX notice_by_workspace ON notice (workspace, id);

-- What calls of a workspace's webhook are signed with, sealed with the keyring.
CREATE TABLE webhook_secret (
    id {text} PRIMARY KEY,
    workspace {text} NOT NULL,
    sealed {bytes} NOT NULL,
    expire_time BIGINT NOT NULL
);
CREATE INDEX webhook_secret_by_workspace ON webhook_secret (workspace, id);
";

const SEVERAL_SERVERS: &str = r"
-- The last number whose rows were removed from the log.
ALTER TABLE change_head ADD COLUMN pruned_seq BIGINT NOT NULL DEFAULT 0;
-- Which timeline of the database the head was last written on, and since when (the database's clock, in milliseconds) that or the epoch is another one than before.
ALTER TABLE change_head ADD COLUMN timeline {text} NOT NULL DEFAULT '';
ALTER TABLE change_head ADD COLUMN history_time BIGINT NOT NULL DEFAULT 0;

-- What those who ask know a changed token by.
ALTER TABLE change_log ADD COLUMN workspace {text} NOT NULL DEFAULT '';
ALTER TABLE change_log ADD COLUMN token_id {text} NOT NULL DEFAULT '';

ALTER TABLE replica ADD COLUMN start_time BIGINT NOT NULL DEFAULT 0;
-- Whether changes wait for this one however long it is silent.
ALTER TABLE replica ADD COLUMN acked_only BOOLEAN NOT NULL DEFAULT FALSE;
ALTER TABLE replica ADD COLUMN evict_time BIGINT;

-- A program that knows this version of the schema can work with the present one. A version that takes away what older programs need moves it up.
CREATE TABLE schema_floor (
    id SMALLINT PRIMARY KEY CHECK (id = 1),
    version {text} NOT NULL
);
INSERT INTO schema_floor (id, version) VALUES (1, '0004_several_servers');
";
