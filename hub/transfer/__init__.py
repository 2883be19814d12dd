"""Moving experts: to and from folders, archives and remote repositories."""
