"""Where a run's traces go: its folder, `metrics.jsonl`, MLflow and the terminal."""
