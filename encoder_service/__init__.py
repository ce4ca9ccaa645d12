"""Media in, visual tokens out: decoding, tiling, InternViT, pixel shuffle, projector."""
