"""UnifyBench++: its folder layout, its tasks and metrics, and the run over held-out items that reports quote."""
