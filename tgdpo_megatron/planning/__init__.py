"""What memory a configuration needs, what lowers it, and what is said when it runs out."""
