-- Times are nanoseconds since 1970 in UTC, NULL if they have not come. Durations are
-- nanoseconds. Columns with JSON hold the JSON forms of the domain's types. An id
-- sorts by time of creation.

-- +goose Up

CREATE TABLE sessions (
    id          TEXT    NOT NULL PRIMARY KEY,
    -- session.State: 1 starting, 2 running, 3 terminating, 4 terminated.
    state       INTEGER NOT NULL CHECK (state BETWEEN 1 AND 4),
    reason      TEXT    NOT NULL,
    detail      TEXT    NOT NULL,
    engine      TEXT    NOT NULL,
    sandbox     TEXT    NOT NULL,
    limits      TEXT    NOT NULL, -- JSON
    lifetime    INTEGER NOT NULL,
    labels      TEXT,             -- JSON; NULL if there are none
    create_time INTEGER NOT NULL,
    end_time    INTEGER
) STRICT;

-- Few at a time, whatever the history: what a start has to look after.
CREATE INDEX sessions_unfinished ON sessions (id) WHERE state < 4;

CREATE TABLE executions (
    id             TEXT    NOT NULL PRIMARY KEY,
    session        TEXT    NOT NULL, -- '' for a one-shot
    command        TEXT    NOT NULL, -- JSON, without values of env and the end of source
    limits         TEXT    NOT NULL, -- JSON
    retained_bytes INTEGER NOT NULL,
    labels         TEXT,             -- JSON; NULL if there are none
    engine         TEXT    NOT NULL,
    sandbox        TEXT    NOT NULL,
    -- execution.State: 1 starting, 2 running, 3 stopping, 4 ended.
    state          INTEGER NOT NULL CHECK (state BETWEEN 1 AND 4),
    result         TEXT,             -- JSON
    epoch          TEXT    NOT NULL,
    sequence       INTEGER NOT NULL,
    create_time    INTEGER NOT NULL,
    start_time     INTEGER,
    end_time       INTEGER
) STRICT;

CREATE INDEX executions_unfinished ON executions (id) WHERE state < 4;

-- Partial, so that a one-shot does not pay for pages of sessions.
CREATE INDEX executions_by_session ON executions (session, id) WHERE session <> '';
CREATE INDEX executions_in_sessions ON executions (id) WHERE session <> '';
