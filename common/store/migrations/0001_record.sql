-- One text for SQLite and PostgreSQL. Ids are text, times are milliseconds
-- since 1970, truth values are 0 or 1, whole records are JSON beside the
-- columns that queries need.

CREATE TABLE nodes (
    host TEXT PRIMARY KEY,
    enabled BIGINT NOT NULL,
    disabled_reason TEXT,
    heard_at_ms BIGINT NOT NULL,
    report TEXT NOT NULL,
    -- Touched first by whoever claims room here: a lock that both databases have.
    claim_serial BIGINT NOT NULL
);

CREATE TABLE instances (
    uuid TEXT PRIMARY KEY,
    name TEXT NOT NULL,
    project_id TEXT NOT NULL,
    host TEXT NOT NULL,
    power_state TEXT NOT NULL,
    vcpus BIGINT NOT NULL,
    memory_mib BIGINT NOT NULL,
    disk_bytes BIGINT NOT NULL,
    generation BIGINT NOT NULL,
    changed_at_ms BIGINT NOT NULL,
    -- Since when its node no longer lists it; null while it does.
    missing_since_ms BIGINT
);
CREATE INDEX instances_by_host ON instances (host);
CREATE INDEX instances_by_name ON instances (name);

CREATE TABLE migrations (
    uuid TEXT PRIMARY KEY,
    id BIGINT NOT NULL UNIQUE,
    instance_uuid TEXT NOT NULL,
    status TEXT NOT NULL,
    -- 1 until it is completed, failed or cancelled.
    active BIGINT NOT NULL,
    source_host TEXT NOT NULL,
    dest_host TEXT,
    -- Who drives its saga, how often that changed hands, and until when nobody
    -- else may take it.
    owner TEXT NOT NULL,
    epoch BIGINT NOT NULL,
    lease_until_ms BIGINT NOT NULL,
    version BIGINT NOT NULL,
    -- How the source's agent says the transfer ended.
    outcome TEXT,
    record TEXT NOT NULL
);
-- One operation on an instance at a time, whoever asks.
CREATE UNIQUE INDEX one_active_migration ON migrations (instance_uuid) WHERE active = 1;
CREATE INDEX migrations_by_status ON migrations (active, owner);

CREATE TABLE claims (
    migration_uuid TEXT PRIMARY KEY,
    host TEXT NOT NULL,
    vcpus BIGINT NOT NULL,
    memory_mib BIGINT NOT NULL,
    disk_bytes BIGINT NOT NULL
);

-- Unique ids of requests that were carried out, to know them when they come again.
CREATE TABLE requests (
    unique_id TEXT PRIMARY KEY,
    migration_uuid TEXT NOT NULL,
    at_ms BIGINT NOT NULL
);

CREATE TABLE saga_events (
    saga_uuid TEXT NOT NULL,
    seq BIGINT NOT NULL,
    epoch BIGINT NOT NULL,
    at_ms BIGINT NOT NULL,
    event TEXT NOT NULL,
    PRIMARY KEY (saga_uuid, seq)
);

-- Tidying that was put off after a migration completed.
CREATE TABLE cleanups (
    migration_uuid TEXT NOT NULL,
    step TEXT NOT NULL,
    at_ms BIGINT NOT NULL,
    PRIMARY KEY (migration_uuid, step)
);

-- Notifications that are committed and not yet published.
CREATE TABLE outbox (
    id TEXT PRIMARY KEY,
    event_type TEXT NOT NULL,
    priority TEXT NOT NULL,
    payload TEXT NOT NULL
);
