-- +goose Up

-- Requests that can be repeated: what each made, and a keyed hash of its parameters.
CREATE TABLE request_ids (
    owner       TEXT    NOT NULL,
    request_id  TEXT    NOT NULL,
    method      TEXT    NOT NULL,
    fingerprint TEXT    NOT NULL,
    resource    TEXT    NOT NULL,
    create_time INTEGER NOT NULL,
    PRIMARY KEY (owner, request_id)
) STRICT, WITHOUT ROWID;

-- For the sweep.
CREATE INDEX request_ids_by_time ON request_ids (create_time);

-- The labels of executions once more, to find executions by them. Sessions are few.
CREATE TABLE execution_labels (
    name      TEXT NOT NULL,
    value     TEXT NOT NULL,
    execution TEXT NOT NULL,
    PRIMARY KEY (name, value, execution)
) STRICT, WITHOUT ROWID;

INSERT INTO execution_labels (name, value, execution)
SELECT label.key, label.value, executions.id FROM executions, json_each(executions.labels) AS label;

-- Labels never change.
-- +goose StatementBegin
CREATE TRIGGER executions_insert_labels AFTER INSERT ON executions WHEN NEW.labels IS NOT NULL
BEGIN
    INSERT INTO execution_labels (name, value, execution)
    SELECT label.key, label.value, NEW.id FROM json_each(NEW.labels) AS label;
END;
-- +goose StatementEnd

-- +goose StatementBegin
CREATE TRIGGER executions_delete_labels AFTER DELETE ON executions WHEN OLD.labels IS NOT NULL
BEGIN
    DELETE FROM execution_labels WHERE execution = OLD.id
    AND (name, value) IN (SELECT label.key, label.value FROM json_each(OLD.labels) AS label);
END;
-- +goose StatementEnd
