"""Forms in which published data sets write one row, each brought to the one that prompts are made of."""
