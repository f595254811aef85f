"""Benchmarks of cuconv against the libraries people use today."""
