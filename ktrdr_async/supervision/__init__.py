"""Joins engines, checkpoints and operations: who may compute, who saves, and how a run ends."""
