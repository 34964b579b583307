"""Measurements of speed and memory. `python benchmarks/run.py --help` lists them; README.md has the rules."""
