-- Power that was cut, and nodes that are silent without being known to be dead.

CREATE TABLE fences (
    -- One operation cuts one node's power, however often it is taken up.
    operation_uuid TEXT PRIMARY KEY,
    host TEXT NOT NULL,
    conductor TEXT NOT NULL,
    at_ms BIGINT NOT NULL,
    -- Until when its conductor may be at it; 0 once the agent has answered.
    until_ms BIGINT NOT NULL
);
CREATE INDEX fences_by_time ON fences (at_ms);
-- Touched first by whoever is to cut power: a lock that both databases have.
INSERT INTO switches (name, is_on) VALUES ('fences', 0);

CREATE TABLE agents_lost (
    host TEXT PRIMARY KEY,
    record TEXT NOT NULL
);
