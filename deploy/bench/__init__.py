"""Benchmarks that print ratios from one run; run with `make bench`."""
