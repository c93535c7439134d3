"""Commands other than train, sample, eval and export."""
