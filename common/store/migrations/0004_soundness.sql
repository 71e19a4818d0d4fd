-- What several conductors need to share a record, and what keeps it from growing
-- without end. All of it expands: nothing that was there changes its meaning.

-- Numbers given out last: none is given twice, not even after its row is gone.
-- Touched by whoever takes the next one: a lock that both databases have.
CREATE TABLE counters (
    name TEXT PRIMARY KEY,
    last BIGINT NOT NULL
);
INSERT INTO counters (name, last) SELECT 'migrations', COALESCE(MAX(id), 0) FROM migrations;
INSERT INTO counters (name, last) SELECT 'operations', COALESCE(MAX(id), 0) FROM operations;

-- Grows with every write, so that whoever has read the row knows whether it is
-- still as it was.
ALTER TABLE instances ADD COLUMN serial BIGINT NOT NULL DEFAULT 0;

-- When it came to its end; null until then, and of rows older than this column.
ALTER TABLE migrations ADD COLUMN ended_at_ms BIGINT;
ALTER TABLE operations ADD COLUMN ended_at_ms BIGINT;
CREATE INDEX migrations_by_end ON migrations (active, id);
CREATE INDEX migrations_by_instance ON migrations (instance_uuid);
CREATE INDEX requests_by_result ON requests (migration_uuid);
CREATE INDEX offers_by_migration ON offers (migration_uuid);

-- Of an evacuation, the generation that its guest has since: what the old copy is
-- measured by when its node returns, though the instance itself may be gone.
ALTER TABLE migrations ADD COLUMN generation BIGINT;

-- A notification that was refused steps aside for the others.
ALTER TABLE outbox ADD COLUMN refusals BIGINT NOT NULL DEFAULT 0;
ALTER TABLE outbox ADD COLUMN not_before_ms BIGINT NOT NULL DEFAULT 0;

-- The oldest schema that a program may know and still work with this record. A
-- change that only expands leaves it; one that contracts raises it.
CREATE TABLE compatibility (
    minimum BIGINT NOT NULL
);
INSERT INTO compatibility (minimum) VALUES (4);
