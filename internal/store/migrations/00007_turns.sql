-- +goose Up

-- The prompts to the agents of sessions, and what became of them.
CREATE TABLE turns (
    id           TEXT    NOT NULL PRIMARY KEY,
    session      TEXT    NOT NULL,
    number       INTEGER NOT NULL, -- from 1 in each session: their order
    owner        TEXT    NOT NULL,
    -- turn.State: 1 queued, 2 running, 3 ended.
    state        INTEGER NOT NULL CHECK (state BETWEEN 1 AND 3),
    text         TEXT    NOT NULL,
    author       TEXT    NOT NULL,
    attachments  TEXT,             -- JSON: names and types; NULL if there are none
    prompt_model TEXT,             -- JSON; NULL for the session's
    model        TEXT,             -- JSON; NULL before it has begun
    summary      TEXT,             -- JSON: the result without what is long in it
    result       TEXT,             -- JSON
    create_time  INTEGER NOT NULL,
    start_time   INTEGER,
    end_time     INTEGER,
    UNIQUE (session, number)
) STRICT;

CREATE INDEX turns_unfinished ON turns (session, number) WHERE state < 3;

-- Apart, so that nobody reads them who does not want them.
CREATE TABLE turn_attachments (
    turn     TEXT    NOT NULL,
    position INTEGER NOT NULL,
    data     BLOB    NOT NULL,
    PRIMARY KEY (turn, position)
) STRICT;

-- What agents asked people.
CREATE TABLE interactions (
    id      TEXT NOT NULL PRIMARY KEY,
    session TEXT NOT NULL,
    turn    TEXT NOT NULL,
    state   TEXT NOT NULL CHECK (state IN ('PENDING', 'RESOLVED', 'EXPIRED', 'VOID')),
    content TEXT NOT NULL -- JSON of turn.Interaction
) STRICT;

CREATE INDEX interactions_by_session ON interactions (session, id);
CREATE INDEX interactions_pending ON interactions (session, id) WHERE state = 'PENDING';
CREATE INDEX interactions_by_turn ON interactions (turn, id);
