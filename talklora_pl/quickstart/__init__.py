"""A small text task with eight skills, made by a generator, so that a first run needs no data set."""
