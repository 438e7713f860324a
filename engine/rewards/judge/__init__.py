"""Judges: by attributes, by descriptions, by a remote model."""
