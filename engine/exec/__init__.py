"""How a step reaches the ranks: one process, or Ray actors with a step channel."""
