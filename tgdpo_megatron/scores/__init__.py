"""Token scores: log-probs of frozen models and token rewards from files, one number per response token."""
