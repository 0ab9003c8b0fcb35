"""Everything that prints a number in the README: `python -m benchmarks` runs it all."""
