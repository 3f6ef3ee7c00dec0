"""The cost of summaries, in gradients."""
