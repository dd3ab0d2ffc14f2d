-- +goose Up

-- JSON: what becomes of output without room, of what nobody watches, of what has ended.
ALTER TABLE executions ADD COLUMN policies TEXT NOT NULL DEFAULT '{}';

-- What the log of an ended execution takes, in bytes; 0 for those that ended before this
-- was counted.
ALTER TABLE executions ADD COLUMN log_bytes INTEGER NOT NULL DEFAULT 0;

-- execution.Deadlines: those that have been warned of.
ALTER TABLE executions ADD COLUMN warned INTEGER NOT NULL DEFAULT 0;

-- When the execution's own retention is over; NULL if it has none or has not ended.
ALTER TABLE executions ADD COLUMN expire_time INTEGER;

-- Covering, so that counting what is kept reads nothing else.
CREATE INDEX executions_ended ON executions (end_time, id, log_bytes) WHERE state = 4;
CREATE INDEX executions_expiring ON executions (expire_time, id, log_bytes) WHERE expire_time IS NOT NULL;
