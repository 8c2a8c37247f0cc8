"""Running megatron-core where we run it: version checks, CPU under gloo, processes."""
