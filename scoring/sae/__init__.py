"""Sparse autoencoders: files of every format, read into one canonical encoder."""
