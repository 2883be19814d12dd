"""File formats, one module each: reading with every check, and writing."""
