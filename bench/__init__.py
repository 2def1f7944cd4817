"""Benchmarks: `pytest bench --benchmark-only`, tables by `python -m bench.report`, all on a GPU by `python -m bench.run`."""
