"""Evaluation: what is asked, what an answer or a drawing is worth, scores while training, and two stages on disk."""
