"""Benchmarks by name: what the rows of a data set of the hub are, how they are asked, and how the answers are scored.

A task is an entry of a YAML file (``configs/tasks``), never code. `task` reads it and makes questions of rows, `answer`
has a model answer them, `scores` says what the answers are worth; `harness` leaves all three to lm-evaluation-harness.
"""
