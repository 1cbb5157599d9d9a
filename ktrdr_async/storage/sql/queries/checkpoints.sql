-- Saving and loading. In every guarded statement `own` locks the operation's row and tests the owner in one step, and
-- everything else selects from it: a zombie that waited on any other lock then finds no row and writes nothing. Parameters
-- $1 operation, $2 epoch, $3 owner token; $4, $5 the revision and digest of the head that was last acknowledged.

-- name: save_checkpoint
-- The head moves only from the revision and digest that this owner last saw: own = 1 with head = 0 is a conflict. (A plain
-- UPDATE would write nothing and say nothing, an upsert would re-create a head that is missing.) Segments come from the head.
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
), beat AS (
    UPDATE ktrdr.operations o SET heartbeat_at = clock_timestamp()
    FROM head WHERE o.operation_id = head.operation_id RETURNING 1
)
SELECT (SELECT count(*) FROM own) AS own, (SELECT count(*) FROM head) AS head, (SELECT count(*) FROM segments) AS segments,
    (SELECT count(*) FROM beat) AS written;

-- name: save_first_checkpoint
-- The first head of an operation is inserted, never upserted: a key that is taken means that this save is in doubt, or that
-- this owner hasn't loaded what is there. $4 and $5 are there only so that both statements take the same parameters.
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
), beat AS (
    UPDATE ktrdr.operations o SET heartbeat_at = clock_timestamp()
    FROM head WHERE o.operation_id = head.operation_id RETURNING 1
)
SELECT (SELECT count(*) FROM own) AS own, (SELECT count(*) FROM head) AS head, (SELECT count(*) FROM segments) AS segments,
    (SELECT count(*) FROM beat) AS written;

-- name: add_segments
-- The first segments of a save or an ending that has many, in one transaction with its own statement, which comes last and
-- says whether all of it is written: the driver holds the loop for as much as one statement has.
WITH own AS (
    SELECT operation_id FROM ktrdr.operations
    WHERE operation_id = $1::text AND epoch = $2::bigint AND owner_token = $3::uuid AND status = 'running' FOR NO KEY UPDATE
)
INSERT INTO ktrdr.ledger_segments (operation_id, sequence, ledger_from, ledger_to, samples_from, samples_to,
    recorded_from, recorded_to, records, prev_digest, digest)
SELECT own.operation_id, s.sequence, s.ledger_from, s.ledger_to, s.samples_from, s.samples_to,
    s.recorded_from, s.recorded_to, s.records::jsonb, s.prev_digest, s.digest
FROM own CROSS JOIN unnest($4::bigint[], $5::bigint[], $6::bigint[], $7::bigint[], $8::bigint[], $9::bigint[],
    $10::bigint[], $11::text[], $12::text[], $13::text[]) AS s (sequence, ledger_from, ledger_to, samples_from,
    samples_to, recorded_from, recorded_to, records, prev_digest, digest);

-- name: bound_idleness
-- Of that transaction: an owner that stops in it (and isn't dead) would else hold the row against the next one.
SELECT set_config('idle_in_transaction_session_timeout', '10000', true);

-- name: lock_operation
-- First of the two statements that resolve a save in doubt: its lock waits for the statement that may still be running.
SELECT status, epoch, owner_token, result_digest, cancel_epoch FROM ktrdr.operations
WHERE operation_id = $1::text FOR NO KEY UPDATE;

-- name: head_position
-- Second of the two: a statement of its own, because one snapshot for both would be from before the wait.
SELECT revision, digest FROM ktrdr.operation_checkpoints WHERE operation_id = $1::text;

-- name: standing
-- Why a guarded statement found no row of ours; without a lock, since what was lost doesn't come back.
SELECT status, epoch, owner_token, result_digest, cancel_epoch FROM ktrdr.operations WHERE operation_id = $1::text;

-- name: load_head
-- Read inside one REPEATABLE READ transaction with the segments.
SELECT o.status, o.final_segment, o.final_digest, c.checkpoint_type, c.state::text AS state, c.revision, c.last_segment,
    c.ledger_count, c.samples_count, c.recorded_count, c.digest,
    (SELECT count(*) FROM ktrdr.ledger_segments s WHERE s.operation_id = o.operation_id) AS segments
FROM ktrdr.operations o LEFT JOIN ktrdr.operation_checkpoints c ON c.operation_id = o.operation_id
WHERE o.operation_id = $1::text;

-- name: load_segments
-- A few at a time, so that neither the driver's nor our decoding holds the loop for a whole ledger.
SELECT sequence, ledger_from, ledger_to, samples_from, samples_to, recorded_from, recorded_to, records::text AS records,
    prev_digest, digest
FROM ktrdr.ledger_segments WHERE operation_id = $1::text AND sequence > $2::bigint AND sequence <= $3::bigint
ORDER BY sequence LIMIT $4::bigint;
