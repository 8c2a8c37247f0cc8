"""Token scores on disk: log-probs of frozen models, one number per response token."""
