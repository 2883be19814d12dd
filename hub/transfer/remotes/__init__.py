"""Remote repositories. Only the modules of this package open sockets."""
