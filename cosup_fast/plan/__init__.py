"""A plan before the run: memory per GPU by simulation, and time by estimate."""
