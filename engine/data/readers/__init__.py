"""Kinds of data files, each read into a `Part`: its rows as text, its pictures where they lie."""
