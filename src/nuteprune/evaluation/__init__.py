"""Measuring models: perplexity, tasks of the lm-evaluation-harness, speed and memory; records of it, and comparisons."""
