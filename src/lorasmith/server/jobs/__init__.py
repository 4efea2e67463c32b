"""Jobs: plans, drafts, the queue and sweeps."""
