"""A model's name to a folder of vetted files, and what its config says.  Reads no weights."""
