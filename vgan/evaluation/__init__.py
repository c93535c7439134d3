"""Metrics and the features they compare images by."""
