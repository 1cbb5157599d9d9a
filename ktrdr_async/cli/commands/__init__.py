"""One module a command: its options and what it does. What they share is one level up."""
