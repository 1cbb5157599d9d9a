"""The engine and what it is made of: pure computation, nothing of saving or of who runs it."""
