"""Drawn flowers with captions: a synthetic data set of any size that needs no files."""
