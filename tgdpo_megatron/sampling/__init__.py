"""Answers sampled from a model: what is asked, who answers, and the file that holds them. Nothing imports Megatron."""
