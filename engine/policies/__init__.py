"""Unified models behind one protocol, each with its attention and its cache."""
