"""Writing compact models."""
