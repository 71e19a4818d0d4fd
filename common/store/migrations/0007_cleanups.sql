-- Clean-ups that fail again and again are tried ever more seldom.
ALTER TABLE cleanups ADD COLUMN attempts BIGINT NOT NULL DEFAULT 0;
ALTER TABLE cleanups ADD COLUMN due_at_ms BIGINT NOT NULL DEFAULT 0;
CREATE INDEX cleanups_by_due ON cleanups (due_at_ms);
