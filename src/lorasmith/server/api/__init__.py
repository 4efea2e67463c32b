"""The project's own API, under /lorasmith/v1: datasets, plans, jobs, runs and their events."""
