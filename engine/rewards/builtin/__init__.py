"""The rewards that come with the engine."""
