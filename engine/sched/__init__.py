"""What to compute next: the KV block pool, the prefix cache, the waiting queue and the step planner."""
