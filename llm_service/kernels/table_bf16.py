"""Measured on an H200 by `python -m llm_service.kernels.timing --tune --write` (torch 2.11, Triton 3.6)."""

from llm_service.kernels.linear_config import GemvConfig, Table, TileConfig

TABLE: Table = {
    (1, 4608, 3584): GemvConfig(block_n=2, block_k=512, num_warps=2),  # 9.5 us, cuBLAS 10.7
    (2, 4608, 3584): None,  # 11.1 us, cuBLAS 11.1
    (4, 4608, 3584): None,  # 11.1 us, cuBLAS 11.1
    (16, 4608, 3584): TileConfig(
        block_n=64, block_k=256, num_warps=4, num_stages=4, split_k=1
    ),  # 10.7 us, cuBLAS 11.1
    (32, 4608, 3584): None,  # 11.2 us, cuBLAS 11.2
    (64, 4608, 3584): None,  # 11.9 us, cuBLAS 11.9
    (1, 3584, 3584): GemvConfig(block_n=2, block_k=512, num_warps=2),  # 8.2 us, cuBLAS 10.8
    (2, 3584, 3584): TileConfig(
        block_n=128, block_k=64, num_warps=4, num_stages=5, split_k=4
    ),  # 9.9 us, cuBLAS 10.8
    (4, 3584, 3584): TileConfig(
        block_n=128, block_k=64, num_warps=4, num_stages=5, split_k=4
    ),  # 9.9 us, cuBLAS 10.8
    (16, 3584, 3584): TileConfig(
        block_n=64, block_k=128, num_warps=4, num_stages=5, split_k=2
    ),  # 9.3 us, cuBLAS 10.9
    (32, 3584, 3584): TileConfig(
        block_n=64, block_k=128, num_warps=4, num_stages=5, split_k=2
    ),  # 9.7 us, cuBLAS 11.1
    (64, 3584, 3584): None,  # 9.8 us, cuBLAS 9.8
    (1, 37888, 3584): GemvConfig(block_n=2, block_k=512, num_warps=2),  # 60.9 us, cuBLAS 69.1
    (2, 37888, 3584): TileConfig(
        block_n=128, block_k=64, num_warps=8, num_stages=3, split_k=1
    ),  # 63.5 us, cuBLAS 68.8
    (4, 37888, 3584): TileConfig(
        block_n=128, block_k=64, num_warps=8, num_stages=3, split_k=1
    ),  # 63.7 us, cuBLAS 69.5
    (16, 37888, 3584): TileConfig(
        block_n=64, block_k=128, num_warps=4, num_stages=3, split_k=1
    ),  # 64.0 us, cuBLAS 70.4
    (32, 37888, 3584): TileConfig(
        block_n=128, block_k=64, num_warps=4, num_stages=3, split_k=1
    ),  # 65.8 us, cuBLAS 71.0
    (64, 37888, 3584): TileConfig(
        block_n=128, block_k=64, num_warps=4, num_stages=3, split_k=1
    ),  # 69.0 us, cuBLAS 71.3
    (1, 3584, 18944): GemvConfig(block_n=4, block_k=1024, num_warps=4),  # 32.8 us, cuBLAS 38.8
    (2, 3584, 18944): GemvConfig(block_n=4, block_k=1024, num_warps=4),  # 34.2 us, cuBLAS 37.6
    (4, 3584, 18944): TileConfig(
        block_n=64, block_k=256, num_warps=4, num_stages=4, split_k=2
    ),  # 35.2 us, cuBLAS 38.1
    (16, 3584, 18944): TileConfig(
        block_n=64, block_k=256, num_warps=4, num_stages=4, split_k=2
    ),  # 34.9 us, cuBLAS 38.0
    (32, 3584, 18944): TileConfig(
        block_n=64, block_k=256, num_warps=4, num_stages=4, split_k=2
    ),  # 35.9 us, cuBLAS 38.5
    (64, 3584, 18944): TileConfig(
        block_n=64, block_k=128, num_warps=4, num_stages=5, split_k=2
    ),  # 37.7 us, cuBLAS 41.8
    (1, 151680, 3584): GemvConfig(block_n=2, block_k=512, num_warps=2),  # 233.9 us, cuBLAS 340.6
    (2, 151680, 3584): GemvConfig(block_n=2, block_k=512, num_warps=2),  # 238.6 us, cuBLAS 405.2
    (4, 151680, 3584): TileConfig(
        block_n=128, block_k=128, num_warps=8, num_stages=5, split_k=1
    ),  # 240.9 us, cuBLAS 413.2
    (16, 151680, 3584): TileConfig(
        block_n=64, block_k=128, num_warps=4, num_stages=3, split_k=1
    ),  # 243.6 us, cuBLAS 393.5
    (32, 151680, 3584): TileConfig(
        block_n=128, block_k=64, num_warps=4, num_stages=3, split_k=1
    ),  # 247.4 us, cuBLAS 389.8
    (64, 151680, 3584): TileConfig(
        block_n=128, block_k=64, num_warps=4, num_stages=3, split_k=1
    ),  # 260.9 us, cuBLAS 415.9
}
