-- Operations, their checkpoints and their ledgers. Every invariant of the protocol that a row can break is held here,
-- so that no client, ours or another, old or new, can store what the rest of the code takes for impossible.

CREATE TABLE ktrdr.operations (
    operation_id text COLLATE "C" PRIMARY KEY
        CONSTRAINT operations_id CHECK (operation_id ~ '^[A-Za-z0-9._-]{1,128}$'),
    type text NOT NULL CONSTRAINT operations_type CHECK (length(type) BETWEEN 1 AND 64),
    status text NOT NULL DEFAULT 'pending' CONSTRAINT operations_status
        CHECK (status IN ('pending', 'running', 'completed', 'failed', 'cancelled', 'interrupted')),
    request jsonb NOT NULL CONSTRAINT operations_request CHECK (jsonb_typeof(request) = 'object'),
    parent_id text COLLATE "C",          -- what it was forked from or extends; it may be deleted, the descent stays
    parent_bar bigint CONSTRAINT operations_parent_bar CHECK (parent_bar >= 0),
    parent_digest text,                  -- hex, the parent's state digest at that bar
    owner_host text,
    owner_boot_id text,
    owner_pid_namespace text,            -- null where the system has none
    owner_pid bigint,
    owner_started double precision,      -- seconds since boot or the epoch; compared for equality only
    owner_token uuid,                    -- random at each claim: an epoch alone can be issued twice
    epoch bigint NOT NULL DEFAULT 0,     -- counts claims
    attempts integer NOT NULL DEFAULT 0,
    cancel_epoch bigint,                 -- the epoch that a canceller saw; void once they differ
    paused boolean NOT NULL DEFAULT false,
    heartbeat_at timestamptz,
    progress jsonb CONSTRAINT operations_progress CHECK (jsonb_typeof(progress) = 'object'),
    result jsonb CONSTRAINT operations_result CHECK (jsonb_typeof(result) = 'object'),
    result_digest text CONSTRAINT operations_result_digest CHECK (result_digest ~ '^[0-9a-f]{64}$'),
    final_segment bigint,                -- of a completed operation: its last segment, 0 for none
    final_digest text,                   -- of a completed operation: that segment's digest
    error jsonb CONSTRAINT operations_error CHECK (jsonb_typeof(error) = 'object'),
    created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    started_at timestamptz,              -- of its first claim
    finished_at timestamptz,             -- of its latest end
    CONSTRAINT operations_epoch CHECK (epoch >= 0 AND attempts >= 0 AND cancel_epoch BETWEEN 0 AND epoch),
    CONSTRAINT operations_claimed CHECK (
        (epoch = 0) = (owner_token IS NULL)
        AND CASE WHEN epoch = 0 THEN status IN ('pending', 'cancelled') ELSE status <> 'pending' END),
    CONSTRAINT operations_owner CHECK (
        num_nonnulls(owner_token, owner_host, owner_boot_id, owner_pid, owner_started, heartbeat_at, started_at) IN (0, 7)),
    CONSTRAINT operations_completed CHECK (
        num_nonnulls(result, result_digest, final_segment, final_digest) = CASE WHEN status = 'completed' THEN 4 ELSE 0 END),
    CONSTRAINT operations_failed CHECK (
        CASE status WHEN 'failed' THEN error IS NOT NULL WHEN 'cancelled' THEN true WHEN 'interrupted' THEN true
            ELSE error IS NULL END),
    CONSTRAINT operations_finished CHECK ((status IN ('pending', 'running')) = (finished_at IS NULL))
) WITH (fillfactor = 70);                -- room for heartbeats on the same page

CREATE INDEX operations_created ON ktrdr.operations (created_at DESC);
CREATE INDEX operations_open ON ktrdr.operations (status) WHERE status IN ('pending', 'running', 'interrupted');

CREATE TABLE ktrdr.operation_checkpoints (
    operation_id text COLLATE "C" PRIMARY KEY REFERENCES ktrdr.operations ON DELETE CASCADE,
    checkpoint_type text NOT NULL CONSTRAINT checkpoints_type
        CHECK (checkpoint_type IN ('periodic', 'cancellation', 'failure', 'shutdown')),
    created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    state jsonb NOT NULL CONSTRAINT checkpoints_state CHECK (
        jsonb_typeof(state) = 'object' AND COALESCE(jsonb_typeof(state -> 'bar_index'), '') = 'number'),
    state_size_bytes bigint NOT NULL CONSTRAINT checkpoints_size CHECK (state_size_bytes > 0),
    revision bigint NOT NULL CONSTRAINT checkpoints_revision CHECK (revision >= 1),
    last_segment bigint NOT NULL CONSTRAINT checkpoints_segment CHECK (last_segment >= 0),
    ledger_count bigint NOT NULL,
    samples_count bigint NOT NULL,
    recorded_count bigint NOT NULL,
    digest text NOT NULL CONSTRAINT checkpoints_digest CHECK (digest ~ '^[0-9a-f]{64}$'),
    CONSTRAINT checkpoints_counts CHECK (
        ledger_count >= 0 AND samples_count >= 0 AND recorded_count >= 0
        AND (last_segment = 0) = (ledger_count + samples_count + recorded_count = 0))
) WITH (fillfactor = 50);

CREATE TABLE ktrdr.ledger_segments (
    operation_id text COLLATE "C" NOT NULL REFERENCES ktrdr.operations ON DELETE CASCADE,
    sequence bigint NOT NULL CONSTRAINT segments_sequence CHECK (sequence >= 1),
    ledger_from bigint NOT NULL,
    ledger_to bigint NOT NULL,
    samples_from bigint NOT NULL,
    samples_to bigint NOT NULL,
    recorded_from bigint NOT NULL,
    recorded_to bigint NOT NULL,
    records jsonb NOT NULL,              -- {"ledger": [...], "equity_samples": [...], "recorded": [...]}
    prev_digest text NOT NULL CONSTRAINT segments_prev_digest CHECK (prev_digest ~ '^[0-9a-f]{64}$'),
    digest text NOT NULL CONSTRAINT segments_digest CHECK (digest ~ '^[0-9a-f]{64}$'),
    PRIMARY KEY (operation_id, sequence),
    CONSTRAINT segments_counts CHECK (
        ledger_from >= 0 AND samples_from >= 0 AND recorded_from >= 0
        AND ledger_to - ledger_from BETWEEN 0 AND 5000
        AND samples_to - samples_from BETWEEN 0 AND 5000
        AND recorded_to - recorded_from BETWEEN 0 AND 5000
        AND ledger_to + samples_to + recorded_to > ledger_from + samples_from + recorded_from),
    CONSTRAINT segments_records CHECK (
        COALESCE(jsonb_array_length(records -> 'ledger'), -1) = ledger_to - ledger_from
        AND COALESCE(jsonb_array_length(records -> 'equity_samples'), -1) = samples_to - samples_from
        AND COALESCE(jsonb_array_length(records -> 'recorded'), -1) = recorded_to - recorded_from)
);

-- pglz is most of what storing a large state costs; a server built without lz4 keeps it.
DO $$
BEGIN
    ALTER TABLE ktrdr.operation_checkpoints ALTER COLUMN state SET COMPRESSION lz4;
    ALTER TABLE ktrdr.ledger_segments ALTER COLUMN records SET COMPRESSION lz4;
EXCEPTION WHEN feature_not_supported THEN
    NULL;
END
$$;

-- An operation begins as pending and moves only along the life cycle (operations/lifecycle.py has the same table).
-- A claim is what raises the epoch, and nothing else changes the owner: two claims can't both have happened.
CREATE FUNCTION ktrdr.operations_guard() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF TG_OP = 'INSERT' THEN
        IF NEW.status <> 'pending' THEN
            RAISE EXCEPTION 'operation % can''t begin as %', NEW.operation_id, NEW.status
                USING ERRCODE = 'check_violation', CONSTRAINT = 'operations_begin';
        END IF;
        RETURN NEW;
    END IF;
    IF NEW.epoch < OLD.epoch OR NEW.epoch > OLD.epoch + 1 THEN
        RAISE EXCEPTION 'operation %: epoch % can''t follow %', NEW.operation_id, NEW.epoch, OLD.epoch
            USING ERRCODE = 'check_violation', CONSTRAINT = 'operations_epoch_order';
    END IF;
    IF NEW.epoch > OLD.epoch THEN
        IF NEW.status <> 'running' OR NEW.owner_token IS NOT DISTINCT FROM OLD.owner_token
                OR NEW.attempts <> OLD.attempts + 1 OR OLD.status = 'completed' THEN
            RAISE EXCEPTION 'operation %: no claim raises the epoch from % (%) to % (%) like this',
                NEW.operation_id, OLD.epoch, OLD.status, NEW.epoch, NEW.status
                USING ERRCODE = 'check_violation', CONSTRAINT = 'operations_claim';
        END IF;
        RETURN NEW;
    END IF;
    IF (NEW.owner_token, NEW.owner_host, NEW.owner_boot_id, NEW.owner_pid_namespace, NEW.owner_pid, NEW.owner_started)
            IS DISTINCT FROM
            (OLD.owner_token, OLD.owner_host, OLD.owner_boot_id, OLD.owner_pid_namespace, OLD.owner_pid, OLD.owner_started)
            OR NEW.attempts <> OLD.attempts THEN
        RAISE EXCEPTION 'operation %: the owner changes only with the epoch', NEW.operation_id
            USING ERRCODE = 'check_violation', CONSTRAINT = 'operations_owner_fixed';
    END IF;
    IF NEW.status <> OLD.status AND (OLD.status, NEW.status) NOT IN (
            ('pending', 'cancelled'), ('interrupted', 'cancelled'),
            ('running', 'completed'), ('running', 'failed'), ('running', 'cancelled'), ('running', 'interrupted')) THEN
        RAISE EXCEPTION 'operation % can''t go from % to %', NEW.operation_id, OLD.status, NEW.status
            USING ERRCODE = 'check_violation', CONSTRAINT = 'operations_transition';
    END IF;
    IF OLD.status = 'completed' AND (NEW.result, NEW.result_digest, NEW.final_segment, NEW.final_digest)
            IS DISTINCT FROM (OLD.result, OLD.result_digest, OLD.final_segment, OLD.final_digest) THEN
        RAISE EXCEPTION 'operation % is completed: its result doesn''t change', NEW.operation_id
            USING ERRCODE = 'check_violation', CONSTRAINT = 'operations_result_fixed';
    END IF;
    RETURN NEW;
END
$$;

-- Column lists keep it away from heartbeats, which are most of the updates.
CREATE TRIGGER operations_guard
    BEFORE INSERT OR UPDATE OF status, epoch, attempts, owner_token, owner_host, owner_boot_id, owner_pid_namespace,
        owner_pid, owner_started, result, result_digest, final_segment, final_digest
    ON ktrdr.operations FOR EACH ROW EXECUTE FUNCTION ktrdr.operations_guard();

CREATE FUNCTION ktrdr.operations_fixed() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF (NEW.operation_id, NEW.type, NEW.request, NEW.parent_id, NEW.parent_bar, NEW.parent_digest, NEW.created_at)
            IS DISTINCT FROM
            (OLD.operation_id, OLD.type, OLD.request, OLD.parent_id, OLD.parent_bar, OLD.parent_digest, OLD.created_at) THEN
        RAISE EXCEPTION 'operation %: what was asked for doesn''t change', OLD.operation_id
            USING ERRCODE = 'check_violation', CONSTRAINT = 'operations_fixed';
    END IF;
    RETURN NEW;
END
$$;

CREATE TRIGGER operations_fixed
    BEFORE UPDATE OF operation_id, type, request, parent_id, parent_bar, parent_digest, created_at
    ON ktrdr.operations FOR EACH ROW EXECUTE FUNCTION ktrdr.operations_fixed();

-- Completion stores the result, appends the last segments and deletes the head in one statement. This fires after all
-- of it, and refuses a completion that left a head behind or a ledger that doesn't end where it says.
CREATE FUNCTION ktrdr.operations_whole() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    last record;
BEGIN
    IF EXISTS (SELECT FROM ktrdr.operation_checkpoints c WHERE c.operation_id = NEW.operation_id) THEN
        RAISE EXCEPTION 'operation % is completed and still has a checkpoint', NEW.operation_id
            USING ERRCODE = 'check_violation', CONSTRAINT = 'operations_no_checkpoint';
    END IF;
    SELECT s.sequence, s.digest INTO last FROM ktrdr.ledger_segments s
        WHERE s.operation_id = NEW.operation_id ORDER BY s.sequence DESC LIMIT 1;
    IF COALESCE(last.sequence, 0) <> NEW.final_segment
            OR (NEW.final_segment > 0 AND last.digest <> NEW.final_digest) THEN
        RAISE EXCEPTION 'operation % is completed at segment %, its ledger ends at %',
            NEW.operation_id, NEW.final_segment, COALESCE(last.sequence, 0)
            USING ERRCODE = 'check_violation', CONSTRAINT = 'operations_whole_ledger';
    END IF;
    RETURN NULL;
END
$$;

CREATE TRIGGER operations_whole AFTER UPDATE OF status ON ktrdr.operations
    FOR EACH ROW WHEN (NEW.status = 'completed') EXECUTE FUNCTION ktrdr.operations_whole();

-- A head only moves forward, one revision at a time.
CREATE FUNCTION ktrdr.checkpoints_guard() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF TG_OP = 'INSERT' THEN
        IF NEW.revision <> 1 THEN
            RAISE EXCEPTION 'operation %: the first checkpoint is revision 1, not %', NEW.operation_id, NEW.revision
                USING ERRCODE = 'check_violation', CONSTRAINT = 'checkpoints_first';
        END IF;
    ELSIF NEW.operation_id <> OLD.operation_id OR NEW.revision <> OLD.revision + 1
            OR NEW.last_segment < OLD.last_segment OR NEW.ledger_count < OLD.ledger_count
            OR NEW.samples_count < OLD.samples_count OR NEW.recorded_count < OLD.recorded_count THEN
        RAISE EXCEPTION 'operation %: revision % can''t follow % like this', OLD.operation_id, NEW.revision, OLD.revision
            USING ERRCODE = 'check_violation', CONSTRAINT = 'checkpoints_forward';
    END IF;
    RETURN NEW;
END
$$;

CREATE TRIGGER checkpoints_guard BEFORE INSERT OR UPDATE ON ktrdr.operation_checkpoints
    FOR EACH ROW EXECUTE FUNCTION ktrdr.checkpoints_guard();

-- After the whole statement: the head stands on the segment that it names, belongs to an operation that was claimed and
-- isn't completed, and is never taken from under an owner that runs.
CREATE FUNCTION ktrdr.checkpoints_whole() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    named text := CASE WHEN TG_OP = 'DELETE' THEN OLD.operation_id ELSE NEW.operation_id END;
    standing text;
BEGIN
    SELECT o.status INTO standing FROM ktrdr.operations o WHERE o.operation_id = named;
    IF TG_OP = 'DELETE' THEN
        IF standing = 'running' THEN
            RAISE EXCEPTION 'operation % is running: its checkpoint can''t be deleted', named
                USING ERRCODE = 'check_violation', CONSTRAINT = 'checkpoints_running';
        END IF;
        RETURN NULL;
    END IF;
    IF standing IN ('pending', 'completed') THEN
        RAISE EXCEPTION 'operation % is %: it can''t have a checkpoint', named, standing
            USING ERRCODE = 'check_violation', CONSTRAINT = 'checkpoints_status';
    END IF;
    IF NEW.last_segment > 0 AND NOT EXISTS (
            SELECT FROM ktrdr.ledger_segments s WHERE s.operation_id = named AND s.sequence = NEW.last_segment
                AND (s.ledger_to, s.samples_to, s.recorded_to) = (NEW.ledger_count, NEW.samples_count, NEW.recorded_count)) THEN
        RAISE EXCEPTION 'operation %: segment % doesn''t end where the checkpoint does', named, NEW.last_segment
            USING ERRCODE = 'check_violation', CONSTRAINT = 'checkpoints_whole_ledger';
    END IF;
    RETURN NULL;
END
$$;

CREATE TRIGGER checkpoints_whole AFTER INSERT OR UPDATE OR DELETE ON ktrdr.operation_checkpoints
    FOR EACH ROW EXECUTE FUNCTION ktrdr.checkpoints_whole();

-- The ledger is append-only, and each segment begins where the one before it ended.
CREATE FUNCTION ktrdr.segments_guard() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF TG_OP = 'UPDATE' THEN
        RAISE EXCEPTION 'operation %: segment % doesn''t change', OLD.operation_id, OLD.sequence
            USING ERRCODE = 'check_violation', CONSTRAINT = 'segments_append_only';
    END IF;
    IF NEW.sequence = 1 THEN
        IF (NEW.ledger_from, NEW.samples_from, NEW.recorded_from) <> (0, 0, 0) OR NEW.prev_digest <> repeat('0', 64) THEN
            RAISE EXCEPTION 'operation %: the first segment begins at 0', NEW.operation_id
                USING ERRCODE = 'check_violation', CONSTRAINT = 'segments_chain';
        END IF;
    ELSIF NOT EXISTS (
            SELECT FROM ktrdr.ledger_segments s WHERE s.operation_id = NEW.operation_id AND s.sequence = NEW.sequence - 1
                AND s.digest = NEW.prev_digest
                AND (s.ledger_to, s.samples_to, s.recorded_to) = (NEW.ledger_from, NEW.samples_from, NEW.recorded_from)) THEN
        RAISE EXCEPTION 'operation %: segment % doesn''t continue segment %',
            NEW.operation_id, NEW.sequence, NEW.sequence - 1
            USING ERRCODE = 'check_violation', CONSTRAINT = 'segments_chain';
    END IF;
    RETURN NULL;
END
$$;

CREATE TRIGGER segments_guard AFTER INSERT OR UPDATE ON ktrdr.ledger_segments
    FOR EACH ROW EXECUTE FUNCTION ktrdr.segments_guard();

-- What people and programs read of an operation: its row and its checkpoint's outline, JSON as text because a caller's
-- pool may decode jsonb in a way of its own.
CREATE VIEW ktrdr.operation_overview AS
SELECT o.operation_id, o.type, o.status, o.request::text AS request, o.parent_id, o.parent_bar, o.parent_digest,
    o.owner_host, o.owner_boot_id, o.owner_pid_namespace, o.owner_pid, o.owner_started,
    o.epoch, o.attempts, o.cancel_epoch, o.paused, o.heartbeat_at, o.progress::text AS progress,
    o.result::text AS result, o.result_digest, o.error::text AS error, o.created_at, o.started_at, o.finished_at,
    (c.state ->> 'bar_index')::bigint AS checkpoint_bar, c.checkpoint_type, c.created_at AS checkpoint_at,
    c.state_size_bytes AS checkpoint_bytes
FROM ktrdr.operations o LEFT JOIN ktrdr.operation_checkpoints c ON c.operation_id = o.operation_id;
