"""What a run shows and keeps: progress on the terminal, metrics as JSON lines, curves, tables."""
