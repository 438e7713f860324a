"""Rewards: plain functions with TRL's keyword signature, run off the training path; a failure is None and counted."""
