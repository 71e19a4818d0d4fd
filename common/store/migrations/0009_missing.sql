-- In how many reports in a row a missing instance was not listed by its node.
ALTER TABLE instances ADD COLUMN missing_reports BIGINT NOT NULL DEFAULT 0;
-- 1 while nothing was seen of it since its node was installed anew.
ALTER TABLE instances ADD COLUMN node_is_new BIGINT NOT NULL DEFAULT 0;
-- Since when its instance is no longer on the record.
ALTER TABLE definitions ADD COLUMN gone_at_ms BIGINT;
