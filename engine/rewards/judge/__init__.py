"""Judges: by attributes, by likelihood, by a remote model."""
