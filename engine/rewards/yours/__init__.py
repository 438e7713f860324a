"""The user's own rewards: loaded by name, isolated, adapted from other codebases."""
