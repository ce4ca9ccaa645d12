"""One decoder for every language-model family that InternVL pairs with."""
