"""Caches behind a URL: buckets, web servers, the Hugging Face hub; what travels between them and a folder."""
