"""Checkpoints: what they hold, when they are due, and the service that stores them."""
