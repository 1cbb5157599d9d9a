-- Operations: creating, claiming, heartbeats, cancelling, looking. Checkpoints and endings have files of their own.

-- name: create_operation
-- Does nothing where the id is taken: the row is then read and its request compared, so that a repeated call, or one whose
-- answer was lost, finds its own operation.
INSERT INTO ktrdr.operations (operation_id, type, request, parent_id, parent_bar, parent_digest)
VALUES ($1::text, $2::text, $3::text::jsonb, $4::text, $5::bigint, $6::text)
ON CONFLICT (operation_id) DO NOTHING;

-- name: operation
-- One operation with its checkpoint's outline.
SELECT * FROM ktrdr.operation_overview WHERE operation_id = $1::text;

-- name: claimable
-- What a claim is decided on; the lease by the server's clock, because hosts' clocks differ.
SELECT status, epoch, owner_token, owner_host, owner_boot_id, owner_pid_namespace, owner_pid, owner_started,
    heartbeat_at < clock_timestamp() - make_interval(secs => $2::double precision) AS lease_passed
FROM ktrdr.operations WHERE operation_id = $1::text;

-- name: claim_operation
-- Compare-and-set on the epoch that was read: of two concurrent claims the second waits on the row and finds another epoch.
-- The lease is looked at again here: the owner may have sent a heartbeat since it was read. $10: the owner is known to be
-- dead, or a person decided.
UPDATE ktrdr.operations SET
    status = 'running', epoch = epoch + 1, attempts = attempts + 1, owner_token = $3::uuid, owner_host = $4::text,
    owner_boot_id = $5::text, owner_pid_namespace = $6::text, owner_pid = $7::bigint,
    owner_started = $8::double precision, heartbeat_at = clock_timestamp(),
    started_at = COALESCE(started_at, clock_timestamp()), finished_at = NULL, error = NULL
WHERE operation_id = $1::text AND epoch = $2::bigint
    AND (status IN ('pending', 'failed', 'cancelled', 'interrupted')
        OR (status = 'running'
            AND ($10::boolean OR heartbeat_at < clock_timestamp() - make_interval(secs => $9::double precision))))
RETURNING epoch;

-- name: heartbeat
-- One statement for all operations of a worker. SKIP LOCKED: a row that a save holds is busy, not lost, and one slow save
-- must not starve the lease of all the others. What wasn't written is judged by the statement's snapshot. Ended: still
-- under this claim, so most likely by the owner itself a moment ago.
WITH beat AS (
    SELECT * FROM unnest($1::text[], $2::bigint[], $3::uuid[], $4::text[]) AS b (operation_id, epoch, owner_token, progress)
), held AS (
    SELECT o.operation_id, b.progress
    FROM ktrdr.operations o JOIN beat b ON b.operation_id = o.operation_id
    WHERE o.epoch = b.epoch AND o.owner_token = b.owner_token AND o.status = 'running'
    FOR NO KEY UPDATE OF o SKIP LOCKED
), written AS (
    UPDATE ktrdr.operations o
    SET heartbeat_at = clock_timestamp(), progress = COALESCE(held.progress::jsonb, o.progress)
    FROM held WHERE o.operation_id = held.operation_id
    RETURNING o.operation_id, o.epoch, o.cancel_epoch, o.paused
)
SELECT b.operation_id,
    CASE WHEN w.operation_id IS NOT NULL THEN 'ours'
        WHEN o.epoch = b.epoch AND o.owner_token = b.owner_token AND o.status = 'running' THEN 'busy'
        WHEN o.epoch = b.epoch AND o.owner_token = b.owner_token THEN 'ended'
        ELSE 'lost' END AS kind,
    COALESCE(w.cancel_epoch = w.epoch, o.cancel_epoch = o.epoch AND o.epoch = b.epoch AND o.owner_token = b.owner_token,
        false) AS cancel,
    COALESCE(w.paused, o.paused, false) AS paused
FROM beat b
LEFT JOIN written w ON w.operation_id = b.operation_id
LEFT JOIN ktrdr.operations o ON o.operation_id = b.operation_id;

-- name: cancel_operation
-- Names the epoch that it cancels, so that a later claim voids it. What nobody runs ends at once; the row lock decides
-- against a completion: whoever commits first. $2 null: whatever epoch there is.
WITH done AS (
    UPDATE ktrdr.operations SET
        cancel_epoch = epoch,
        status = CASE WHEN status = 'running' THEN status ELSE 'cancelled' END,
        finished_at = CASE WHEN status = 'running' THEN NULL ELSE clock_timestamp() END
    WHERE operation_id = $1::text AND status IN ('pending', 'interrupted', 'running')
        AND ($2::bigint IS NULL OR epoch = $2::bigint)
    RETURNING operation_id
)
SELECT operation_id, pg_notify('ktrdr_async', operation_id) FROM done;

-- name: cancel_abandoned
-- A cancelled operation whose owner is dead, or lost its lease, has nobody left who would hear of it: it ends here. The epoch
-- and the lease are looked at again under the row's lock: a claim, or a heartbeat, may have come between.
UPDATE ktrdr.operations SET status = 'cancelled', finished_at = clock_timestamp()
WHERE operation_id = $1::text AND epoch = $2::bigint AND status = 'running' AND cancel_epoch = epoch
    AND ($4::boolean OR heartbeat_at < clock_timestamp() - make_interval(secs => $3::double precision))
RETURNING operation_id;

-- name: pause_operation
-- The owner hears of it by its heartbeat; the notification only makes it faster.
WITH done AS (
    UPDATE ktrdr.operations SET paused = $2::boolean
    WHERE operation_id = $1::text AND status <> 'completed'
    RETURNING operation_id
)
SELECT operation_id, pg_notify('ktrdr_async', operation_id) FROM done;

-- name: find_operations
-- Ids that begin with a prefix; an exact match comes first. No pattern: `_` and `.` in an id mean themselves.
SELECT operation_id FROM ktrdr.operations WHERE starts_with(operation_id, $1::text)
ORDER BY operation_id LIMIT $2::bigint;

-- name: latest_operation
-- The most recent one that isn't completed, else the most recent.
SELECT * FROM ktrdr.operation_overview
ORDER BY status = 'completed', GREATEST(created_at, heartbeat_at, finished_at) DESC, operation_id LIMIT 1;

-- name: list_operations
-- Newest first; an empty list of statuses means all.
SELECT * FROM ktrdr.operation_overview
WHERE cardinality($1::text[]) = 0 OR status = ANY ($1::text[])
ORDER BY created_at DESC, operation_id LIMIT $2::bigint;

-- name: abandoned_operations
-- What may have no owner: whether a running one's process lives is decided by the caller where it can know.
SELECT v.*, v.heartbeat_at < clock_timestamp() - make_interval(secs => $1::double precision) AS lease_passed
FROM ktrdr.operation_overview v WHERE v.status IN ('running', 'interrupted') ORDER BY v.created_at, v.operation_id;

-- name: old_operations
-- Candidates for cleaning: untouched for $1 seconds; a running one must have lost its lease ($2 seconds) too.
SELECT operation_id, epoch, status, owner_host, owner_boot_id, owner_pid_namespace, owner_pid, owner_started
FROM ktrdr.operations
WHERE GREATEST(created_at, heartbeat_at, finished_at) < clock_timestamp() - make_interval(secs => $1::double precision)
    AND (status <> 'running' OR heartbeat_at < clock_timestamp() - make_interval(secs => $2::double precision))
ORDER BY created_at, operation_id;

-- name: delete_operation
-- The conditions again, under the row's lock: a claim may have come since the candidates were read, and then another epoch
-- stands there. Checkpoint and ledger go with the row.
DELETE FROM ktrdr.operations
WHERE operation_id = $1::text AND epoch = $2::bigint
    AND GREATEST(created_at, heartbeat_at, finished_at) < clock_timestamp() - make_interval(secs => $3::double precision)
    AND (status <> 'running' OR heartbeat_at < clock_timestamp() - make_interval(secs => $4::double precision))
RETURNING operation_id;

-- name: delete_checkpoint
-- Head and segments in one statement: a head without its ledger, or a ledger without its head, could never be loaded. The
-- operation's row is locked first, so that no claim begins between; of a completed one the segments are the result.
WITH own AS (
    SELECT operation_id FROM ktrdr.operations
    WHERE operation_id = $1::text AND status NOT IN ('running', 'completed') FOR NO KEY UPDATE
), head AS (
    DELETE FROM ktrdr.operation_checkpoints c USING own WHERE c.operation_id = own.operation_id RETURNING 1
), segments AS (
    DELETE FROM ktrdr.ledger_segments s USING own WHERE s.operation_id = own.operation_id RETURNING 1
)
SELECT (SELECT count(*) FROM own) AS own, (SELECT count(*) FROM head) AS head, (SELECT count(*) FROM segments) AS segments;
