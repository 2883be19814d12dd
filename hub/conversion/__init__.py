"""Conversion of adapters that other programs wrote into the hub's own kinds of experts."""
