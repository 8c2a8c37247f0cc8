"""Preference pairs: read and checked, tokenised once, batched flat."""
