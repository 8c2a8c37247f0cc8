"""The speed benchmark: ratios of time, memory and work within one run."""
