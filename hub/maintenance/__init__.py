"""Maintenance of what the hub stores: verification, repair, collection and disk usage."""
