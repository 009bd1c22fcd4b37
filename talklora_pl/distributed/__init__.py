"""Many processes, many nodes, nothing lost: the strategy, checkpoint writer and seeding that Lightning lacks for adapters."""
