"""The paper in miniature: pairs sampled from the start model, a learned scorer, and a reward that is known."""
