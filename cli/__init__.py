"""The command line `hub`: one module per group of commands."""
