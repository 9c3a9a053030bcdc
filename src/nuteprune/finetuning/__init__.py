"""Instruction fine-tuning of a pruned model."""
