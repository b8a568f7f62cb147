"""What a cache is, byte for byte (docs/cache-format.md): nothing here knows where one lies."""
