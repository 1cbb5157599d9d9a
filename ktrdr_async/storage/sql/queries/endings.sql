-- How a run ends: each ending is one statement. Ledger, head and status in two guarded statements would be wrong either
-- way: the second finds a status that isn't `running` and writes nothing, or a crash leaves the first one alone.

-- name: finish_completed
-- A cancellation that committed first wins: its epoch stands in the row. The head must be the one that was acknowledged, or
-- absent where none was (revision $4 = 0), else nothing at all is written and own = 1, written = 0 is a conflict.
WITH own AS (
    SELECT operation_id FROM ktrdr.operations
    WHERE operation_id = $1::text AND epoch = $2::bigint AND owner_token = $3::uuid AND status = 'running'
        AND cancel_epoch IS DISTINCT FROM epoch FOR NO KEY UPDATE
), head AS (
    DELETE FROM ktrdr.operation_checkpoints c USING own
    WHERE c.operation_id = own.operation_id AND c.revision = $4::bigint AND c.digest = $5::text RETURNING 1
), permitted AS (
    SELECT own.operation_id FROM own
    WHERE CASE WHEN $4::bigint = 0
        THEN NOT EXISTS (SELECT FROM ktrdr.operation_checkpoints c WHERE c.operation_id = own.operation_id)
        ELSE (SELECT count(*) FROM head) = 1 END
), segments AS (
    INSERT INTO ktrdr.ledger_segments (operation_id, sequence, ledger_from, ledger_to, samples_from, samples_to,
        recorded_from, recorded_to, records, prev_digest, digest)
    SELECT permitted.operation_id, s.sequence, s.ledger_from, s.ledger_to, s.samples_from, s.samples_to,
        s.recorded_from, s.recorded_to, s.records::jsonb, s.prev_digest, s.digest
    FROM permitted CROSS JOIN unnest($6::bigint[], $7::bigint[], $8::bigint[], $9::bigint[], $10::bigint[], $11::bigint[],
        $12::bigint[], $13::text[], $14::text[], $15::text[]) AS s (sequence, ledger_from, ledger_to, samples_from,
        samples_to, recorded_from, recorded_to, records, prev_digest, digest)
    RETURNING 1
), ended AS (
    UPDATE ktrdr.operations o SET
        status = 'completed', result = $16::text::jsonb, result_digest = $17::text, final_segment = $18::bigint,
        final_digest = $19::text, heartbeat_at = clock_timestamp(), finished_at = clock_timestamp()
    FROM permitted WHERE o.operation_id = permitted.operation_id RETURNING o.status
)
SELECT (SELECT count(*) FROM own) AS own, (SELECT count(*) FROM head) AS head, (SELECT count(*) FROM segments) AS segments,
    (SELECT count(*) FROM ended) AS written, (SELECT status FROM ended) AS status;

-- name: finish_with_checkpoint
-- Cancelled, failed or interrupted: the head moves on with the status. An interruption (of a worker that leaves) under a
-- cancellation is one: else the next worker would take up again what a person has cancelled.
WITH own AS (
    SELECT operation_id FROM ktrdr.operations
    WHERE operation_id = $1::text AND epoch = $2::bigint AND owner_token = $3::uuid AND status = 'running' FOR NO KEY UPDATE
), head AS (
    UPDATE ktrdr.operation_checkpoints c SET
        checkpoint_type = $6::text, created_at = clock_timestamp(), state = $7::text::jsonb, state_size_bytes = $8::bigint,
        revision = c.revision + 1, last_segment = $9::bigint, ledger_count = $10::bigint, samples_count = $11::bigint,
        recorded_count = $12::bigint, digest = $13::text
    FROM own WHERE c.operation_id = own.operation_id AND c.revision = $4::bigint AND c.digest = $5::text
    RETURNING c.operation_id
), segments AS (
    INSERT INTO ktrdr.ledger_segments (operation_id, sequence, ledger_from, ledger_to, samples_from, samples_to,
        recorded_from, recorded_to, records, prev_digest, digest)
    SELECT head.operation_id, s.sequence, s.ledger_from, s.ledger_to, s.samples_from, s.samples_to,
        s.recorded_from, s.recorded_to, s.records::jsonb, s.prev_digest, s.digest
    FROM head CROSS JOIN unnest($14::bigint[], $15::bigint[], $16::bigint[], $17::bigint[], $18::bigint[], $19::bigint[],
        $20::bigint[], $21::text[], $22::text[], $23::text[]) AS s (sequence, ledger_from, ledger_to, samples_from,
        samples_to, recorded_from, recorded_to, records, prev_digest, digest)
    RETURNING 1
), ended AS (
    UPDATE ktrdr.operations o SET
        status = CASE WHEN $24::text = 'interrupted' AND o.cancel_epoch = o.epoch THEN 'cancelled' ELSE $24::text END,
        error = $25::text::jsonb, heartbeat_at = clock_timestamp(), finished_at = clock_timestamp()
    FROM head WHERE o.operation_id = head.operation_id RETURNING o.status
)
SELECT (SELECT count(*) FROM own) AS own, (SELECT count(*) FROM head) AS head, (SELECT count(*) FROM segments) AS segments,
    (SELECT count(*) FROM ended) AS written, (SELECT status FROM ended) AS status;

-- name: finish_with_first_checkpoint
-- As finish_with_checkpoint, for a run that has saved nothing yet: inserted, never upserted.
WITH own AS (
    SELECT operation_id FROM ktrdr.operations
    WHERE operation_id = $1::text AND epoch = $2::bigint AND owner_token = $3::uuid AND status = 'running'
        AND $4::bigint = 0 AND $5::text = '' FOR NO KEY UPDATE
), head AS (
    INSERT INTO ktrdr.operation_checkpoints (operation_id, checkpoint_type, created_at, state, state_size_bytes, revision,
        last_segment, ledger_count, samples_count, recorded_count, digest)
    SELECT own.operation_id, $6::text, clock_timestamp(), $7::text::jsonb, $8::bigint, 1, $9::bigint, $10::bigint,
        $11::bigint, $12::bigint, $13::text
    FROM own
    RETURNING operation_id
), segments AS (
    INSERT INTO ktrdr.ledger_segments (operation_id, sequence, ledger_from, ledger_to, samples_from, samples_to,
        recorded_from, recorded_to, records, prev_digest, digest)
    SELECT head.operation_id, s.sequence, s.ledger_from, s.ledger_to, s.samples_from, s.samples_to,
        s.recorded_from, s.recorded_to, s.records::jsonb, s.prev_digest, s.digest
    FROM head CROSS JOIN unnest($14::bigint[], $15::bigint[], $16::bigint[], $17::bigint[], $18::bigint[], $19::bigint[],
        $20::bigint[], $21::text[], $22::text[], $23::text[]) AS s (sequence, ledger_from, ledger_to, samples_from,
        samples_to, recorded_from, recorded_to, records, prev_digest, digest)
    RETURNING 1
), ended AS (
    UPDATE ktrdr.operations o SET
        status = CASE WHEN $24::text = 'interrupted' AND o.cancel_epoch = o.epoch THEN 'cancelled' ELSE $24::text END,
        error = $25::text::jsonb, heartbeat_at = clock_timestamp(), finished_at = clock_timestamp()
    FROM head WHERE o.operation_id = head.operation_id RETURNING o.status
)
SELECT (SELECT count(*) FROM own) AS own, (SELECT count(*) FROM head) AS head, (SELECT count(*) FROM segments) AS segments,
    (SELECT count(*) FROM ended) AS written, (SELECT status FROM ended) AS status;

-- name: finish_without_checkpoint
-- Ended before the first boundary, or nothing new to save: whatever head there is stays.
WITH own AS (
    SELECT operation_id FROM ktrdr.operations
    WHERE operation_id = $1::text AND epoch = $2::bigint AND owner_token = $3::uuid AND status = 'running' FOR NO KEY UPDATE
), ended AS (
    UPDATE ktrdr.operations o SET
        status = CASE WHEN $4::text = 'interrupted' AND o.cancel_epoch = o.epoch THEN 'cancelled' ELSE $4::text END,
        error = $5::text::jsonb, heartbeat_at = clock_timestamp(), finished_at = clock_timestamp()
    FROM own WHERE o.operation_id = own.operation_id RETURNING o.status
)
SELECT (SELECT count(*) FROM own) AS own, 1::bigint AS head, 0::bigint AS segments,
    (SELECT count(*) FROM ended) AS written, (SELECT status FROM ended) AS status;
