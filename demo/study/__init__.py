"""The study: what the paper's claims come to in the demo world, where a gold reward exists (docs/study.md)."""
