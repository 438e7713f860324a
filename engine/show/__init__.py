"""What a run shows: on the terminal, in its folder, in its report."""
