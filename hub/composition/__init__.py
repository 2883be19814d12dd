"""Composition: a plan and the state of its method become a model."""
