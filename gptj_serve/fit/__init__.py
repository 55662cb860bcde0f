"""Task heads from labelled examples: read them, compute their features through the pipeline, fit, measure, write."""
