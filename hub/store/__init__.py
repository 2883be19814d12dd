"""The content-addressed store: the files of experts by digest, and what still needs them."""
