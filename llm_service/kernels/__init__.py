"""What the decoder computes, as an interface with two implementations: PyTorch's own operators, and Triton.

Only select_ops() imports the Triton modules, and only for a CUDA device.
"""
