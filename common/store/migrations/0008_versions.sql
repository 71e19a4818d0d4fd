-- Versions of RPC that an agent speaks, with the incarnation that said so: one that
-- registers with a conductor that does not know this column has said nothing.
ALTER TABLE agents ADD COLUMN speaks TEXT;
