"""`--mode excess`: how far a model is from the best possible one, and its samples from copies."""
