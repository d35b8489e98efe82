"""What a model is worth on held-out text: loss, perplexity, bits per byte, baselines and samples."""
