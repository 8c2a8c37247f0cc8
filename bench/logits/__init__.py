"""What rounding logits to bf16 does to log-probs, to r̂ and to TGDPO's weights."""
