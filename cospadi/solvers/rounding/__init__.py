"""Rounding that knows its error: numbers of few bits, chosen so that the outputs of a layer change little."""
