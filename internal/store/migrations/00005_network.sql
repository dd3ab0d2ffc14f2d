-- +goose Up

-- The network policy in force: JSON of egress.Policy; NULL, which is none, for all that
-- was made before there was a choice.
ALTER TABLE executions ADD COLUMN network TEXT;
ALTER TABLE sessions ADD COLUMN network TEXT;
