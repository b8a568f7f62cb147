"""Keeping a store in order: names, uses and locks, collecting, comparing, measuring."""
