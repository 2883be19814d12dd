"""Reading what experts are stored as, with every check, and without a tensor library."""
