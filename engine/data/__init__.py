"""Training data from files, folders and the Hugging Face hub: tables, the samples made of them, and their stream."""
