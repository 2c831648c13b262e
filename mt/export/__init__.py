"""A run's model for other programs."""
