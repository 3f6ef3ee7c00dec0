"""Full-batch and scientific problems, at equal seconds and equal gradients."""
