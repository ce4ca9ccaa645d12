"""Prompts and visual tokens in, text out: scheduler, paged KV cache, decoder, sampler."""
