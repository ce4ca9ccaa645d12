"""Builds the part of flash-attn that Tessera uses, from the package's source distribution."""
