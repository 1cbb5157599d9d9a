"""Storage: the database that operations and checkpoints live in, embedded or the user's own."""
