"""Execution: wakes, claims, supervises the engine in a child process and publishes what it made."""
