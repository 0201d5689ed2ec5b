"""Measurements, run by hand as `python -m tests.benchmarks.NAME`; pytest does not collect them."""
