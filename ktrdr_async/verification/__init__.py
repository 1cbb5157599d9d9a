"""Proof on the user's own strategy: runs are interrupted, repeated and shown other futures, and compared in every bit.

A face on top of supervision, beside the command line. No database is needed: what is proved here is that a boundary
holds all of a run; that what is stored comes back is the storage's own tests'.
"""
