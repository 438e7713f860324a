"""Ranks and machines: started, watched, stopped."""
