"""Settings: their fields and ranges, from YAML and flags."""
