-- Projects, what is promised of their quota, and offers of instances.

CREATE TABLE projects (
    id TEXT PRIMARY KEY,
    name TEXT NOT NULL,
    -- Touched first by whoever claims quota here: a lock that both databases have.
    claim_serial BIGINT NOT NULL,
    record TEXT NOT NULL
);
CREATE INDEX projects_by_name ON projects (name);
CREATE INDEX instances_by_project ON instances (project_id);

CREATE TABLE quota_claims (
    migration_uuid TEXT PRIMARY KEY,
    project_id TEXT NOT NULL,
    instances BIGINT NOT NULL,
    vcpus BIGINT NOT NULL,
    memory_mb BIGINT NOT NULL,
    disk_bytes BIGINT NOT NULL
);

CREATE TABLE offers (
    id TEXT PRIMARY KEY,
    instance_uuid TEXT NOT NULL,
    instance_name TEXT NOT NULL,
    from_project TEXT NOT NULL,
    -- Who alone may accept; null if whoever has the key may.
    to_project TEXT,
    -- SHA-256 of the key, which itself is kept nowhere.
    key_digest TEXT NOT NULL,
    offered_by TEXT NOT NULL,
    created_at_ms BIGINT NOT NULL,
    expires_at_ms BIGINT NOT NULL,
    wrong_keys BIGINT NOT NULL,
    withdrawn BIGINT NOT NULL,
    -- The transfer that came of it last. Where an offer stands follows from
    -- that, from the instance and from the time; it is not kept.
    migration_uuid TEXT
);
CREATE INDEX offers_by_instance ON offers (instance_uuid);

ALTER TABLE migrations ADD COLUMN migration_type TEXT NOT NULL DEFAULT 'live-migration';
UPDATE migrations SET migration_type = 'migration'
    WHERE record LIKE '%"migration_type":"migration"%';
