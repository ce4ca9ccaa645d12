"""Pictures in, visual tokens out: media decoding, tiling, InternViT, pixel shuffle, projector."""
