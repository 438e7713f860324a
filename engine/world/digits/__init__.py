"""A world that nobody drew: digits that people wrote by hand."""
