"""The content-addressed store of experts, and who uses what is in it."""
