"""Malformed frames, and the machines that `benchmarks/fuzz.py` gives them to."""
