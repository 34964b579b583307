"""Readers of captioned images on disk: one file per format, and their common code."""
