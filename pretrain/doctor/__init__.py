"""Checks of a machine and a cluster before a job is given to them: each says what it found, and what to do about it."""
