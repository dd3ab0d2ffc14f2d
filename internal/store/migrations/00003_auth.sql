-- Who owns what, and the API keys.

-- +goose Up

-- '' for what is older than this column.
ALTER TABLE executions ADD COLUMN owner TEXT NOT NULL DEFAULT '';
ALTER TABLE sessions ADD COLUMN owner TEXT NOT NULL DEFAULT '';

-- Bytes of output that are kept of an execution that has ended, for its owner's quota.
ALTER TABLE executions ADD COLUMN stored_bytes INTEGER NOT NULL DEFAULT 0;

-- Partial, so that a server that asks nobody who they are does not pay for them.
CREATE INDEX executions_by_owner ON executions (owner, id, stored_bytes) WHERE owner <> 'local';
CREATE INDEX sessions_by_owner ON sessions (owner, id) WHERE owner <> 'local';

CREATE TABLE api_keys (
    id            TEXT    NOT NULL PRIMARY KEY,
    name          TEXT    NOT NULL,
    -- auth.Role: 1 user, 2 operator, 3 admin.
    role          INTEGER NOT NULL CHECK (role BETWEEN 1 AND 3),
    hash          BLOB    NOT NULL CHECK (length(hash) = 32), -- SHA-256 of the secret
    create_time   INTEGER NOT NULL,
    expire_time   INTEGER,
    revoke_time   INTEGER,
    last_use_time INTEGER
) STRICT;
