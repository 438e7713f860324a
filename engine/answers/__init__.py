"""Reading answers: which letter does a text choose, and do two texts say the same thing? Data and rewards ask here."""
