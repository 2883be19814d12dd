"""Readers of the formats in which other programs store adapters, one module each.

Each has a function `read` that brings an adapter into the form that peft saves.
"""
