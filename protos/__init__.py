"""The contract: only what both ends of a wire must agree on.

Messages, tensor bytes, errors, fingerprints, server and channel conduct.
"""
