"""InternViT and the projector, configured by facts read from a checkpoint."""
