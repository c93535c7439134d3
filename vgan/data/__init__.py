"""Data sets: where pictures come from, the packed store they are kept in, and the feed that hands out batches."""
