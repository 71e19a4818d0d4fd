-- Which run of a node's agent is its agent, and how it lives. Apart from the
-- node's row, which claims lock.
CREATE TABLE agents (
    host TEXT PRIMARY KEY,
    -- Counts the agents that were let in.
    incarnation BIGINT NOT NULL,
    identity TEXT NOT NULL,
    -- 1 once it has said good-bye.
    gone BIGINT NOT NULL,
    -- Sequence of its last heartbeat.
    beat BIGINT NOT NULL,
    agent_version TEXT NOT NULL,
    clock_offset_ms BIGINT NOT NULL,
    -- For how long a conductor that could hear it has not, as of its last look.
    silent_ms BIGINT NOT NULL,
    -- How often something in its name was refused, and why the last time.
    refusals BIGINT NOT NULL,
    refusal TEXT
);

-- A copy of an instance that is active on another node than the record's.
ALTER TABLE instances ADD COLUMN other_copy TEXT;
-- What of an instance cannot be read, and why.
ALTER TABLE instances ADD COLUMN unreadable TEXT;
-- Nodes whose next report may be older than a move that settled: it does not
-- count for this instance.
ALTER TABLE instances ADD COLUMN awaited TEXT;
