"""Federations of real processes."""
