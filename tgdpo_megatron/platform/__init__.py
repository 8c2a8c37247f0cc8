"""Running megatron-core: checks of installed packages, support for CPUs, patches of the optimizer, processes."""
