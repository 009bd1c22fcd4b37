"""Many processes, many nodes, nothing lost: what Lightning lacks for a frozen base with adapters."""
