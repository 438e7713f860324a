"""CoRL / ULM-R1: unified RL, refined RL, merging."""
