"""Command-line tools: files in, files out."""
