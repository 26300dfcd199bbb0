"""Measuring a model: perplexity, multiple choice and a generated sample."""
