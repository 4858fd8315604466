"""What every method stands on: updates, rounds, sums, and the registry."""
