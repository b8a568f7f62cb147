"""Objectives, one file each: settings, formula, what it asks of a cache. Pure."""
