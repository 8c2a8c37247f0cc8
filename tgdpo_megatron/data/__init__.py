"""Preference pairs: they are read and checked, tokenised once, and put into flat batches."""
