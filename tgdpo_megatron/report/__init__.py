"""What a run shows: metrics, plots, the HTML page."""
