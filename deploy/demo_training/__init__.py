"""How the demo model was made: synthetic pictures, questions about them, the training loop, the accuracy."""
