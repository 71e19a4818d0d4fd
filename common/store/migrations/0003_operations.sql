-- Operations on nodes, what is kept for the day on which a node is dead, and
-- whose turn it is to send memory.

CREATE TABLE operations (
    uuid TEXT PRIMARY KEY,
    id BIGINT NOT NULL UNIQUE,
    kind TEXT NOT NULL,
    -- The node it is about; '*' for all of them.
    subject TEXT NOT NULL,
    -- 1 until it is at its end.
    active BIGINT NOT NULL,
    owner TEXT NOT NULL,
    epoch BIGINT NOT NULL,
    lease_until_ms BIGINT NOT NULL,
    version BIGINT NOT NULL,
    record TEXT NOT NULL
);
-- One operation on a node at a time, whoever asks.
CREATE UNIQUE INDEX one_active_operation ON operations (subject) WHERE active = 1;

-- Definitions as nodes told them last.
CREATE TABLE definitions (
    instance_uuid TEXT PRIMARY KEY,
    host TEXT NOT NULL,
    digest TEXT NOT NULL,
    taken_at_ms BIGINT NOT NULL,
    record TEXT NOT NULL
);
CREATE INDEX definitions_by_host ON definitions (host);

-- What an operator switched off, or on again. A row not there is on.
CREATE TABLE switches (
    name TEXT PRIMARY KEY,
    is_on BIGINT NOT NULL
);
-- Touched first by whoever takes a turn: a lock that both databases have.
INSERT INTO switches (name, is_on) VALUES ('turns', 0);

-- An operator's word that the node is down, whatever it says.
ALTER TABLE nodes ADD COLUMN forced_down BIGINT NOT NULL DEFAULT 0;

-- 1 while memory (or disks) are being sent.
ALTER TABLE migrations ADD COLUMN sending BIGINT NOT NULL DEFAULT 0;
ALTER TABLE migrations ADD COLUMN operation_uuid TEXT;
-- Of an evacuation, 1 until the node that came back has given up its copy.
ALTER TABLE migrations ADD COLUMN old_copy BIGINT NOT NULL DEFAULT 0;
CREATE INDEX migrations_by_operation ON migrations (operation_uuid);
