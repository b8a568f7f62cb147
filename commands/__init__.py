"""The commands, one file each or per group: parse, call, print. Torch is imported only by those that compute."""
