"""What is reported of a run: metrics, charts and HTML pages."""
