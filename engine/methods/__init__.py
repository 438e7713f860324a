"""Methods put together from their settings, and what every one of them shares: a training from start to report."""
