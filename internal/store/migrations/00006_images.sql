-- +goose Up

-- Builds of images. An image is what its newest ready build made.
CREATE TABLE image_builds (
    id          TEXT    NOT NULL PRIMARY KEY,
    image       TEXT    NOT NULL,
    engine      TEXT    NOT NULL,
    recipe      TEXT    NOT NULL,             -- hash
    sandbox     TEXT    NOT NULL,
    state       INTEGER NOT NULL CHECK (state BETWEEN 1 AND 3), -- image.State: 1 building, 2 ready, 3 failed
    ref         TEXT    NOT NULL DEFAULT '',  -- the engine's name of what was made
    size_bytes  INTEGER NOT NULL DEFAULT 0,
    create_time INTEGER NOT NULL,
    end_time    INTEGER,
    failure     TEXT                          -- JSON of image.Failure
) STRICT;

CREATE INDEX image_builds_by_image ON image_builds (engine, image, id);
