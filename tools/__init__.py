"""Command-line tools, which read files and write files."""
