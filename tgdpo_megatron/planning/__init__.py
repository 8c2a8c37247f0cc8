"""The memory planner: how much a configuration needs, what lowers it, and the message when memory runs out."""
