"""Checkpoints on disk: written whole or not at all, merged piece by piece, handed on with a card."""
