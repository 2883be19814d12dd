"""Moving experts: from and to folders, archives and remote repositories."""
