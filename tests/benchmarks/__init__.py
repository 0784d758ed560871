"""Benchmarks: the implicit way beside the dense one, in one run. `python -m tests.benchmarks --help`."""
