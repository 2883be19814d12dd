"""Tracing: records which experts each token chose, summarises the record, and shows it as a page."""
