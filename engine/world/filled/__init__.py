"""The embedded worlds for a model that fills images in: a tiny Show-o, its image tokenizer and what it is taught."""
