"""Many requests, one model."""
