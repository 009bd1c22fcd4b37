"""Memory of a training step: what it will take, what it takes, and what trades it for time."""
