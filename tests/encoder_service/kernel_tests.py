"""Which tests of the encoder import Triton; test_vision.py runs them in its interpreter without a GPU."""

KERNEL_TESTS = (
    "tests/encoder_service/test_resample_kernels.py",
    "tests/encoder_service/test_gpu_tiling.py",
    "tests/encoder_service/test_tower_graphs.py",
    "tests/encoder_service/test_cuda_vision.py",
    "tests/encoder_service/model/test_fused_kernels.py",
    "tests/encoder_service/model/test_fused_vision.py",
)
