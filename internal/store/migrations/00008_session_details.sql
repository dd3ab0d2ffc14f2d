-- +goose Up

-- What a session was made with beside its sandbox: JSON of session.Details. Of one whose
-- state within its stage running is another (paused, for example), phase says which.
ALTER TABLE sessions ADD COLUMN details TEXT;
ALTER TABLE sessions ADD COLUMN phase INTEGER NOT NULL DEFAULT 0;
