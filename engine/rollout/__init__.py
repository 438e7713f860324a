"""Trajectories sampled: many groups at once, each prompt run once."""
