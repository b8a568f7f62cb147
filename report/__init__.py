"""Figures, tables and pages. Knows numbers and words; no models, no stores, no recipes."""
