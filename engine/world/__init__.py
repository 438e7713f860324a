"""The embedded default: rendered pictures of twelve personalised creatures, their facts, and an image tokenizer."""
