"""Benchmarks: `pytest bench --benchmark-only`; tables: `python -m bench.report`; all on a GPU: `python -m bench.run`."""
